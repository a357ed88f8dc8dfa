"""A run in miniature: a denoiser of three layers with dropout, batches that are a function of their place.

As a program it trains one run, for tests that need processes: ``python toy_run.py OPTIONS.json``.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finetune.adapter import Adapter, ParameterGroup, Weights
from finetune.batch import Batch, Posterior
from finetune.config import Recipe
from finetune.config.command import exit_codes
from finetune.distributed import Processes, start
from finetune.randomness import generator
from finetune.train import Trainer

SHAPE = (4, 2, 2)


class ToyAdapter(Adapter):
    """Two groups that train; the layer between them stays frozen."""

    kind = "full"

    def __init__(self, networks: nn.ModuleDict, rate: float | None = None) -> None:
        self._networks, self._rate = networks, rate
        networks.requires_grad_(False)
        for group in self.groups():
            for parameter in group.parameters.values():
                parameter.requires_grad_(True)

    def groups(self) -> list[ParameterGroup]:
        named = {f"denoiser.{name}": value for name, value in self._networks["denoiser"].named_parameters()}
        first = {name: value for name, value in named.items() if ".first." in name}
        last = {name: value for name, value in named.items() if ".last." in name}
        return [ParameterGroup("first", first), ParameterGroup("last", last, self._rate)]

    def networks(self) -> frozenset[str]:
        return frozenset({"denoiser"})

    def weights(self) -> Weights:
        named = {name: value for group in self.groups() for name, value in group.parameters.items()}
        return Weights(self.kind, {name: value.detach().cpu().clone() for name, value in named.items()})

    def load(self, tensors: Mapping[str, Tensor]) -> None: ...

    def disabled(self) -> AbstractContextManager[None]:
        return nullcontext()


class ToyBatches:
    """Subject ``k`` of the endless order is picture ``k % 7``; G per step, shared out as the real sampler does."""

    hashes: Mapping[str, str] = {f"{number}.png": "0" * 8 for number in range(7)}

    def __init__(self, recipe: Recipe, processes: Processes, nan_at: tuple[int, ...] = ()) -> None:
        self.train, self.processes, self.nan_at = recipe.train, processes, nan_at
        self.seen: list[tuple[str, ...]] = []

    def from_step(self, step: int) -> Iterator[Batch]:
        size, parts, world = self.train.batch_size, self.train.gradient_accumulation_steps, self.processes.world
        while True:
            for part in range(parts):
                begin = step * size * parts * world + (part * world + self.processes.rank) * size
                batch = self._batch(range(begin, begin + size))
                if self.nan_at == (step, self.processes.rank):
                    batch.posterior.mean[0] = float("nan")
                self.seen.append(batch.ids)
                yield batch
            step += 1

    def _batch(self, draws: range) -> Batch:
        mean = torch.stack([torch.randn(SHAPE, generator=generator(0, "toy", draw % 7)) for draw in draws])
        return Batch(
            ids=tuple(f"{draw % 7}.png" for draw in draws),
            draws=tuple(draws),
            captions=("a photo",) * len(draws),
            posterior=Posterior(mean=mean, logvar=torch.zeros_like(mean)),
            prior=torch.tensor([draw % 2 == 1 for draw in draws]),
            weight=torch.ones(len(draws)),
            geometry=torch.zeros(len(draws), 6, dtype=torch.int64),
        )


class ToyLoss(NamedTuple):
    total: Tensor
    instance: Tensor
    prior: Tensor


class Denoiser(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first, self.layers, self.last = nn.Linear(16, 8), nn.ModuleList([nn.Linear(8, 8)]), nn.Linear(8, 16)
        self.dropout = nn.Dropout(dropout)

    def forward(self, latents: Tensor) -> Tensor:
        return self.last(self.dropout(torch.tanh(self.layers[0](torch.tanh(self.first(latents.flatten(1)))))))


def recipe(output: Path | str, **train: Any) -> Recipe:
    """A recipe of a toy run; ``every`` is its checkpoint interval, the rest goes to ``train``."""
    checkpoint = {key: train.pop(key) for key in ("every", "keep", "resume") if key in train}
    values = {
        "recipe": "full",
        "output": str(output),
        "adapter": {"kind": "full"},
        "data": {"concepts": [{"folder": "pictures", "prompt": "a photo"}]},
        "train": {"steps": 6, "batch_size": 2, "learning_rate": 0.05, "threads": 1, **train},
        "checkpoint": checkpoint,
    }
    return Recipe.model_validate_json(json.dumps(values))


def build(
    recipe: Recipe, dropout: float = 0.3, last_rate: float | None = None, loose: bool = False
) -> tuple[Trainer, nn.ModuleDict]:
    """A trainer, and its networks in the same random state every time; with ``loose``, a weight outside the loss."""
    processes = start(recipe.train)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = nn.ModuleDict({"denoiser": Denoiser(dropout)})
        if loose:
            networks["denoiser"].last.register_parameter("loose", nn.Parameter(torch.ones(3)))  # type: ignore[operator]
    adapter = ToyAdapter(networks, last_rate)

    def loss(batch: Batch) -> ToyLoss:
        clean = batch.posterior.mean
        error = (networks["denoiser"](clean) - clean.flatten(1)).square().mean(1)
        return ToyLoss(error.mean(), error[~batch.prior].sum(), error[batch.prior].sum())

    return Trainer(recipe, processes, networks, adapter, loss), networks


def main(path: Path) -> None:
    """Train. Options beside the recipe: seconds to ``pause`` in every step, ``nan_at``, ``signal_at`` and ``raise_at``
    [step, rank], and where to write each picture ``seen`` (its step, id and draw).
    """
    options = json.loads(path.read_text())
    run = Recipe.model_validate_json(json.dumps(options["recipe"]))
    trainer, _ = build(run, dropout=options.get("dropout", 0.3))
    seen: list[tuple[int, str, int]] = []
    if "seen" in options:
        path = Path(f"{options['seen']}.{trainer.processes.rank}.json")
        atexit.register(lambda: path.write_text(json.dumps(seen)))
    for batch in trainer.steps(ToyBatches(run, trainer.processes, tuple(options.get("nan_at", ())))):
        seen += [(trainer.step, *one) for one in zip(batch.ids, batch.draws, strict=True)]
        trainer.update(batch)
        time.sleep(options.get("pause", 0))
        if [trainer.step, trainer.processes.rank] == options.get("signal_at"):
            os.kill(os.getpid(), signal.SIGUSR1)
        if [trainer.step, trainer.processes.rank] == options.get("raise_at"):
            raise RuntimeError("out of coffee")
    weights = trainer.finish()
    if trainer.processes.is_main:
        from finetune.files import write_tensors

        write_tensors(trainer.folder.adapters / "toy.safetensors", weights[0].tensors)


if __name__ == "__main__":
    with exit_codes():
        main(Path(sys.argv[1]))
