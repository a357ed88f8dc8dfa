"""What ``verify`` asks of a whole model in one file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from torch import Tensor, nn

from finetune.adapter import Weights
from finetune.config.schema import ModelConfig
from finetune.errors import GuardError
from finetune.export.checks import Report, quiet
from finetune.families import families
from finetune.families.folder import Part
from finetune.families.originals import clip
from finetune.families.originals.checkpoint import Checkpoint, opened, read_checkpoint
from finetune.families.originals.convert import places
from finetune.families.originals.place import Place
from finetune.families.originals.template import Template, template


@dataclass(frozen=True)
class Held:
    """An open file and where each weight of the model stands in it.

    Attributes:
        parts: by the names of ``ModelFamily.networks``.
        places: by the same names, then by names in diffusers' files.
    """

    checkpoint: Checkpoint
    file: safe_open
    parts: Mapping[str, Part]
    places: Mapping[str, Mapping[str, Place]]

    def weight(self, network: str, name: str) -> Tensor | None:
        """The weight that is called ``name`` in the network in memory; None where the file has none."""
        place = self.places[network].get(clip.in_full(name) if self.parts[network].tokenizer else name)
        return None if place is None else place.take(self.file.get_tensor(self.checkpoint.tensors[place.key].key))


def check_file(report: Report, path: Path, base: str | None, weights: Weights | None) -> None:
    """Whether every weight is there and finite, is what was trained, and arrives in diffusers.

    Args:
        base: whose settings and tokenizers diffusers loads the file with; as ``template`` finds them where it is not
            given.
    """
    checkpoint = report.run("layout", lambda: read_checkpoint(path), lambda one: one.layout.name)
    if checkpoint is None:
        return
    config = ModelConfig(path=str(path), like=base)
    beside = report.run("settings", lambda: template(checkpoint, config), lambda one: f"of {one.source}")
    if beside is None:
        return
    with opened(path) as file:
        held = report.run("keys", lambda: _held(checkpoint, beside, file), _count)
        if held is None:
            return
        report.run("finite", lambda: _finite(held))
        if weights is not None:
            report.run("equal to memory", lambda: _same(held, weights))
        with _loaded(report, checkpoint, beside) as networks:
            if networks is not None:
                report.run("diffusers: every weight arrives", lambda: _arrived(held, networks))


def _held(checkpoint: Checkpoint, beside: Template, file: safe_open) -> Held:
    parts = dict(families()[checkpoint.layout.family].parts)
    return Held(checkpoint, file, parts, {name: places(checkpoint, beside, part) for name, part in parts.items()})


def _count(held: Held) -> str:
    return f"all {sum(map(len, held.places.values()))} weights have a tensor of their shape"


def _finite(held: Held) -> str:
    keys = sorted({place.key for found in held.places.values() for place in found.values()})
    for key in keys:
        if not bool(torch.isfinite(held.file.get_tensor(held.checkpoint.tensors[key].key)).all()):
            raise GuardError(f"{key} holds numbers that are NaN or infinite")
    return f"{len(keys)} tensors"


def _same(held: Held, weights: Weights) -> str:
    for name, trained in weights.tensors.items():
        network, _, inner = name.partition(".")
        stored = held.weight(network, inner)
        if stored is None:
            raise GuardError(f"{name} is missing")
        if not torch.equal(trained.to(stored.dtype), stored):
            raise GuardError(f"{name} differs from what was trained")
    return f"bit for bit, {len(weights.tensors)} trained tensors"


@contextmanager
def _loaded(report: Report, checkpoint: Checkpoint, beside: Template) -> Iterator[Mapping[str, nn.Module] | None]:
    """The networks as ``from_single_file`` of diffusers' pipeline loads them, in the file's dtype."""
    import diffusers

    pipeline = getattr(diffusers, checkpoint.layout.pipeline)

    def load(folder: Path) -> Mapping[str, nn.Module]:
        beside.write(folder)
        with quiet():
            loaded = pipeline.from_single_file(
                str(checkpoint.path), config=str(folder), local_files_only=True, torch_dtype=checkpoint.dtype
            )
        parts = families()[checkpoint.layout.family].parts
        return {name: getattr(loaded, part.subfolder) for name, part in parts.items()}

    with TemporaryDirectory() as folder:
        yield report.run(
            "diffusers: loads", lambda: load(Path(folder)), lambda _: f"{pipeline.__name__}.from_single_file"
        )


def _arrived(held: Held, networks: Mapping[str, nn.Module]) -> str:
    count = 0
    for network, module in networks.items():
        for name, value in module.state_dict().items():
            stored = held.weight(network, name)
            if stored is None:
                raise GuardError(f"{network}.{name} is a weight that no tensor of the file has a place for")
            if not torch.equal(value, stored.to(value.dtype)):
                raise GuardError(f"{network}.{name} is loaded with other values than the file's")
            count += 1
    return f"bit for bit, {count} weights"
