"""The folder of a run: what lies where, and whether it is this recipe's."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from finetune.config import Recipe, lock, read_recipe
from finetune.distributed import Processes
from finetune.errors import UserError
from finetune.files import remove_partial, write_text
from finetune.train.optimizers import require_available

# What may change between a run's beginnings: how long, how it is watched, what is written at the end. The batch may be
# divided otherwise as long as a step sees as many pictures; the trainer compares that number.
_FREE = (
    "output",
    "profile",
    "model.block_swap",
    "train.steps",
    "train.batch_size",
    "train.gradient_accumulation_steps",
    "train.gradient_checkpointing",
    "train.device",
    "train.threads",
    "data.cache.*",
    "data.strict",
    "prior.batch_size",
    "checkpoint.*",
    "samples.*",
    "export.*",
    "report.*",
)
_VERSIONS = ("torch", "diffusers", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what it writes."""

    path: Path

    @property
    def lock(self) -> Path:
        """The recipe as resolved, every default written out."""
        return self.path / "recipe.lock.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per step and line."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Pictures drawn while training."""
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        """What the run is continued from."""
        return self.path / "checkpoints"

    @property
    def adapters(self) -> Path:
        """What the run is for: one file or folder per format."""
        return self.path / "adapters"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        """The page that shows what the run did."""
        return self.path / "report.html"


def check_run(recipe: Recipe, processes: Processes) -> None:
    """Refuse the output folder of another run, and an optimizer that is not there. Writes nothing.

    Call it before work that may still fail.

    Raises:
        UserError: the folder holds another run, or is no folder; or the optimizer cannot be had.
    """
    require_available(recipe.train.optimizer)
    processes.on_main(lambda: _check(RunFolder(Path(recipe.output)), recipe), "reading the output folder")


def open_run(recipe: Recipe, processes: Processes) -> RunFolder:
    """Make or find the run's folder, clear what an interrupted writer left, and write the recipe down.

    Raises:
        UserError: the folder is no folder of this run.
    """
    folder = RunFolder(Path(recipe.output))
    processes.on_main(lambda: _open(folder, recipe), "opening the output folder")
    return folder


def decisive(recipe: Recipe) -> dict[str, Any]:
    """The settings that decide what is trained, ``train.optimizer.eps`` -> value."""
    flat = dict(_flatten(recipe.model_dump(mode="json")))
    return {key: value for key, value in flat.items() if not any(fnmatch(key, free) for free in _FREE)}


def fingerprint(recipe: Recipe) -> str:
    """Hex digest of ``decisive``."""
    return hashlib.sha256(json.dumps(decisive(recipe), sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Of the libraries that a run's bits depend on."""
    return {name: importlib.metadata.version(name) for name in _VERSIONS}


def _check(folder: RunFolder, recipe: Recipe) -> None:
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"output: {folder.path} is a file; a run needs a folder")
    if folder.lock.exists():
        _require_same(folder, recipe)
    elif folder.checkpoints.exists() or folder.adapters.exists():
        raise UserError(f"output: {folder.path} holds something of another run and no recipe.lock.yaml; {_ADVICE}")
    if not recipe.checkpoint.resume and any(folder.checkpoints.glob("step-*")):
        raise UserError(f"checkpoint.resume is false, but {folder.path} holds checkpoints; {_ADVICE}")


def _open(folder: RunFolder, recipe: Recipe) -> None:
    _check(folder, recipe)
    folder.path.mkdir(parents=True, exist_ok=True)
    for place in (folder.path, folder.checkpoints, folder.samples, folder.adapters):
        remove_partial(place)
    header = "".join(f"# {name} {version}\n" for name, version in versions().items())
    write_text(folder.lock, header + lock(recipe))


_ADVICE = "choose another output folder, or move this one away to begin again"


def _require_same(folder: RunFolder, recipe: Recipe) -> None:
    try:
        there = decisive(read_recipe(folder.lock))
    except UserError as error:
        raise UserError(f"{error}\noutput: {folder.path} holds a run of another version; {_ADVICE}") from None
    here = decisive(recipe)
    differing = [
        f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise UserError(f"output: {folder.path} holds another run: {', '.join(differing[:5])}{more}; {_ADVICE}")


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
