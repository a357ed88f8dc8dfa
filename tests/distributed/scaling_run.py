"""Train recipes under a launcher and write down what each process holds and sends; for test_scaling_figures.py and
tests/benchmarks/scaling.py.

``python scaling_run.py CELLS.json``: ``{name: recipe}``. Beside each run's output folder comes ``<name>.<rank>.json``.
Bytes are counted as storages of tensors, and collectives as they reach c10d, whoever asks for them.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.config import Recipe
from finetune.config.command import exit_codes
from finetune.plan.inventory import inventory
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
}


class Sent(TorchDispatchMode):
    """Inside, notes every collective: what it does, and the bytes of the whole tensor that it is about.

    One that is not known here is an error, since it would be a way of sending that nobody counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "barrier" not in func._opname:
            way, place = WAYS[func._opname]
            self.calls.append((way, sum(one.nbytes for one in tensors(args[place]))))
        return func(*args, **(kwargs or {}))


class Storages:
    """Bytes under names; a storage counts under the first name that it is found under."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self._seen: set[int] = set()

    def add(self, name: str, found: Iterable[Tensor | None]) -> None:
        for tensor in found:
            local = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
            if local is None or local.device.type == "meta" or not local.numel():
                continue
            storage = local.untyped_storage()
            if storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.bytes[name] += storage.nbytes()


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors(one)


def held(trainer: Trainer, networks: nn.Module) -> Counter[str]:
    """Bytes of this process, by what they are for."""
    engine: Any = trainer._engine
    zero: Any = getattr(engine, "_zero", None)
    found, weights = Storages(), list(networks.parameters())
    updated = [one for group in engine.optimizer.param_groups for one in group["params"]]
    updated += engine._flats() if zero is not None else []
    for what, flag in (("frozen", False), ("trained", True)):
        chosen = [one for one in weights if one.requires_grad is flag]
        found.add(what, [*chosen, *(getattr(one, "ds_tensor", None) for one in chosen)])  # and its piece under ZeRO-3
    found.add("copies", updated)
    found.add("gradients", [one.grad for one in (*weights, *updated)])
    averaged = getattr(zero, "averaged_gradients", {}).values()
    found.add("gradients", [getattr(zero, "grad_partitions_flat_buffer", None), *tensors(list(averaged))])
    memory = [value for state in engine.optimizer.state.values() for what, value in state.items() if what != "step"]
    found.add("optimizer", tensors(memory))
    return found.bytes


class Notes:
    """What is written down of one run."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.weights: list[dict[str, Any]] = []
        self.held: Counter[str] = Counter()  # the most, between backward passes and before the step
        self.sent: list[tuple[str, int]] = []  # of the step that goes on
        self.last: list[tuple[str, int]] = []  # of the last whole one

    def write(self) -> None:
        told = {"weights": self.weights, "held": self.held, "sent": self.last}
        Path(f"{self.recipe.output}.{os.environ.get('RANK', '0')}.json").write_text(json.dumps(told))


def note(notes: Notes) -> None:
    """Watch the trainers that are made from here on."""
    begin, update, finish = _PLAIN

    def noting_begin(self: Trainer, recipe: Any, processes: Any, networks: nn.ModuleDict, adapter: Any, *rest: Any):
        found = inventory(networks, adapter.groups(), list(networks))
        notes.weights = [dataclasses.asdict(one) for one in found]
        self.noted = networks  # type: ignore[attr-defined]
        begin(self, recipe, processes, networks, adapter, *rest)

    def noting_update(self: Trainer, batch: Any) -> Any:
        with Sent() as sent:
            found = update(self, batch)
        notes.sent += sent.calls
        if self._updated:
            notes.last, notes.sent = notes.sent, []
        else:
            notes.held |= held(self, self.noted)  # type: ignore[attr-defined]
        return found

    def noting_finish(self: Trainer, *rest: Any) -> None:
        notes.held |= held(self, self.noted)  # type: ignore[attr-defined]
        finish(self, *rest)

    Trainer.__init__, Trainer.update, Trainer._finish_step = (  # type: ignore[method-assign]
        noting_begin,
        noting_update,
        noting_finish,
    )


_PLAIN = Trainer.__init__, Trainer.update, Trainer._finish_step


def main(cells: Path) -> None:
    for name, values in json.loads(cells.read_text()).items():
        print(f"cell {name}", flush=True)
        recipe = Recipe.model_validate_json(json.dumps(values))
        notes = Notes(recipe)
        note(notes)
        importlib.import_module(f"recipes.{recipe.recipe}").main(recipe)
        notes.write()


if __name__ == "__main__":
    with exit_codes():
        main(Path(sys.argv[1]))
