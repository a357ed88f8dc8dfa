"""Train recipes under a launcher and write down what each process holds and sends; for test_scaling.py and
tests/benchmarks/scaling.py.

``python scaling_run.py CELLS.json``: ``{name: recipe}``. Beside each run's output folder comes ``<name>.<rank>.json``.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.config import Recipe
from finetune.config.command import exit_codes
from finetune.train import Trainer

WAYS = {  # of c10d's operators -> what it does, and which of its arguments holds what all processes have together
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "allgather_coalesced_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
}


class Sent(TorchDispatchMode):
    """Inside, notes every collective: what it does, and the bytes of the whole tensor it is about."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._opname not in ("barrier", "monitored_barrier_"):
            way, place = WAYS[func._opname]
            self.calls.append((way, sum(one.nbytes for one in tensors(args[place]))))
        return func(*args, **(kwargs or {}))


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors(one)


class Storages:
    """Bytes under names; a storage counts under the first name that it is found under."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self._seen: set[int] = set()

    def add(self, name: str, found: Iterable[Tensor | None]) -> None:
        for tensor in found:
            if tensor is None:
                continue
            local = getattr(tensor, "_local_tensor", tensor)
            try:
                storage = local.untyped_storage()
            except (NotImplementedError, RuntimeError):
                continue
            if storage.device.type == "meta" or storage._cdata in self._seen:
                continue
            self._seen.add(storage._cdata)
            self.bytes[name] += storage.nbytes()


def held(trainer: Trainer, networks: nn.Module) -> dict[str, int]:
    """Bytes of this process, by what they are for."""
    engine: Any = trainer._engine
    zero, found = getattr(engine, "_zero", None), Storages()
    weights = list(networks.parameters())
    updated = [one for group in engine.optimizer.param_groups for one in group["params"]]
    updated += engine._flats() if zero is not None else []
    for what, chosen in (
        ("frozen", [one for one in weights if not one.requires_grad]),
        ("trained", [one for one in weights if one.requires_grad]),
    ):
        found.add(what, chosen)
        found.add(what, [getattr(one, "ds_tensor", None) for one in chosen])
    found.add("buffers", networks.buffers())
    found.add("copies", updated)
    found.add("gradients", [one.grad for one in (*weights, *updated)])
    found.add("gradients", [getattr(zero, "grad_partitions_flat_buffer", None)])
    found.add("gradients", tensors(dict(getattr(zero, "averaged_gradients", {}))))
    memory = (value for state in engine.optimizer.state.values() for name, value in state.items() if name != "step")
    found.add("optimizer", tensors(list(memory)))
    reducer = getattr(getattr(engine, "_trainee", None), "reducer", None)
    buckets = [bucket for bucket in reducer._get_zeros_like_grad_buckets()] if reducer else []
    found.bytes["buckets"] += sum(bucket.buffer().nbytes for bucket in buckets)
    others = [one for one in gc.get_objects() if isinstance(one, Tensor)]
    found.add("others", others)
    big = sorted({(tuple(o.shape), o.untyped_storage().nbytes()) for o in others if type(o) in (Tensor, nn.Parameter) and o.device.type != "meta"}, key=lambda x: -x[1])[:6]
    return {**found.bytes, "big": big}


def main(cells: Path) -> None:
    made: dict[int, nn.Module] = {}
    begin, update, finish = Trainer.__init__, Trainer.update, Trainer._finish_step
    steps: list[dict[str, Any]] = []

    def noting_init(self: Trainer, recipe: Any, processes: Any, networks: nn.ModuleDict, *rest: Any) -> None:
        made["networks"] = networks
        begin(self, recipe, processes, networks, *rest)

    def noting_update(self: Trainer, batch: Any) -> Any:
        steps.append({})
        with Sent() as sent:
            found = update(self, batch)
        steps[-1]["sent"] = sent.calls
        return found

    def noting_finish(self: Trainer, *rest: Any) -> None:
        steps[-1]["before"] = held(self, made["networks"])
        finish(self, *rest)
        steps[-1]["after"] = held(self, made["networks"])

    Trainer.__init__, Trainer.update, Trainer._finish_step = noting_init, noting_update, noting_finish  # type: ignore
    for name, values in json.loads(cells.read_text()).items():
        steps.clear()
        recipe = Recipe.model_validate_json(json.dumps(values))
        importlib.import_module(f"recipes.{recipe.recipe}").main(recipe)
        rank = os.environ.get("RANK", "0")
        sizes = {kind: sum(p.numel() for p in made["networks"].parameters() if p.requires_grad is flag) for kind, flag in (("trained", True), ("frozen", False))}
        Path(f"{recipe.output}.{rank}.json").write_text(json.dumps({"sizes": sizes, "steps": steps}))


if __name__ == "__main__":
    with exit_codes():
        main(Path(sys.argv[1]))
