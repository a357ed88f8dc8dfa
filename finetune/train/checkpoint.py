"""What a run is continued from: folders that are valid or are not there, without pickle.

``checkpoints/step-000123`` holds the trained weights and their average (``state.safetensors``), the optimizer's
memory (``optimizer.safetensors``), the numbers (``state.json``) and, written last, ``manifest.json`` with the hash of
each. No generator's state is stored: all randomness is named, not remembered.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.files import replacing_folder, sha256, write_json, write_tensors

_NAME = re.compile(r"step-(\d{6,})")
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Snapshot:
    """A run between two updates.

    Attributes:
        step: updates done.
        trained: trained weights by canonical name.
        average: their moving average, or empty.
        optimizer: the optimizer's memory, ``<parameter>/<what>`` -> tensor.
        facts: numbers that are no tensors, and what the run was: plain JSON.
    """

    step: int
    trained: Mapping[str, Tensor]
    average: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def save(checkpoints: Path, snapshot: Snapshot, keep: int) -> Path:
    """Write ``snapshot``; when it is whole, remove the oldest beyond ``keep``. Returns its folder.

    Those of later steps go first: the run did not continue from them, so they are damaged.
    """
    path = checkpoints / f"step-{snapshot.step:06d}"
    if not is_valid(path):
        with replacing_folder(path) as folder:
            tensors = {f"trained/{name}": value for name, value in snapshot.trained.items()}
            tensors |= {f"average/{name}": value for name, value in snapshot.average.items()}
            write_tensors(folder / "state.safetensors", tensors)
            write_tensors(folder / "optimizer.safetensors", snapshot.optimizer)
            write_json(folder / "state.json", {"step": snapshot.step, **snapshot.facts})
            write_json(folder / _MANIFEST, {file.name: sha256(file) for file in sorted(folder.iterdir())})
    found = _all(checkpoints)
    here = found.index(path)
    for other in found[:here] + found[here + keep :]:
        shutil.rmtree(other)
    return path


def load(path: Path) -> Snapshot:
    """Read a valid checkpoint; tensors are on the CPU."""
    from safetensors.torch import load_file

    tensors = load_file(path / "state.safetensors")
    facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Snapshot(
        step=facts.pop("step"),
        trained=_below("trained/", tensors),
        average=_below("average/", tensors),
        optimizer=load_file(path / "optimizer.safetensors"),
        facts=facts,
    )


def newest(checkpoints: Path, say: Callable[[str], None] = print) -> Path | None:
    """The valid checkpoint of the highest step, or None. Damaged ones are passed over, and that is said."""
    for path in _all(checkpoints):
        if is_valid(path):
            return path
        say(f"{path} is damaged (its files do not have the hashes of its manifest): passed over")
    return None


def is_valid(path: Path) -> bool:
    """True where the manifest is there and every file has the hash it says."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        return len(manifest) == 3 and all(sha256(path / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def _all(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, the newest first."""
    if not checkpoints.is_dir():
        return []
    numbered = [(int(match[1]), path) for path in checkpoints.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
