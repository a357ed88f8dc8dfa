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
from finetune.families.parts import Part
from finetune.families.single_file.checkpoint import Checkpoint, opened, read_checkpoint
from finetune.families.single_file.layouts import FLUX
from finetune.families.single_file.network import Network, network, weights_in
from finetune.families.single_file.template import Template, template

_FLUX_WIDTH = 3072  # the one that diffusers' converter knows


@dataclass(frozen=True)
class Held:
    """An open file and where each weight of the model stands in it.

    Attributes:
        parts, networks: by the names of ``ModelFamily.networks``.
    """

    checkpoint: Checkpoint
    file: safe_open
    parts: Mapping[str, Part]
    networks: Mapping[str, Network]

    def weight(self, network: str, name: str) -> Tensor | None:
        """The weight that is called ``name`` in the network in memory; None where the file has none."""
        component, found = self.checkpoint.layout.components[self.parts[network].subfolder], self.networks[network]
        full = component.copies.get(name, component.full(name))
        return found.read(self.file, full) if full in found.places else None


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
        if unread := _unread(checkpoint):
            report.run("diffusers: not asked", lambda: unread)
            return
        with _loaded(report, checkpoint, beside) as networks:
            if networks is not None:
                report.run("diffusers: every weight arrives", lambda: _arrived(held, networks))


def _held(checkpoint: Checkpoint, beside: Template, file: safe_open) -> Held:
    networks = {name: network(checkpoint, beside, part) for name, part in beside.parts.items()}
    return Held(checkpoint, file, beside.parts, networks)


def _count(held: Held) -> str:
    return f"all {sum(len(found.places) for found in held.networks.values())} weights have a tensor of their shape"


def _finite(held: Held) -> str:
    keys = sorted(key for found in held.networks.values() for key in found.keys)
    for key in keys:
        if not bool(torch.isfinite(held.checkpoint.tensors[key].read(held.file)).all()):
            raise GuardError(f"{key} holds numbers that are NaN or infinite")
    return f"{len(keys)} tensors"


def _unread(checkpoint: Checkpoint) -> str | None:
    """Why diffusers' converter cannot read a file that is right."""
    width = checkpoint.tensors[checkpoint.layout.first].shape[0]
    if checkpoint.layout is FLUX and width != _FLUX_WIDTH:
        return f"its converter knows FLUX.1 of width {_FLUX_WIDTH} alone, and this one has {width}"
    return None


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
                str(checkpoint.path),
                config=str(folder),
                local_files_only=True,
                torch_dtype=checkpoint.dtype,
                **dict.fromkeys(_absent(checkpoint, beside)),
            )
        return {name: getattr(loaded, part.subfolder) for name, part in beside.parts.items()}

    with TemporaryDirectory() as folder:
        yield report.run(
            "diffusers: loads", lambda: load(Path(folder)), lambda _: f"{pipeline.__name__}.from_single_file"
        )


def _absent(checkpoint: Checkpoint, beside: Template) -> Iterator[str]:
    """What diffusers must be told that it is not there."""
    for name, part in families()[checkpoint.layout.family].parts.items():
        if name not in beside.parts:
            yield from filter(None, (part.subfolder, part.tokenizer))


def _arrived(held: Held, networks: Mapping[str, nn.Module]) -> str:
    count, taken = 0, []
    for part, module in networks.items():
        component = held.checkpoint.layout.components[held.parts[part].subfolder]
        for name, value in weights_in(module).items():
            stored = held.weight(part, name)
            if stored is None:
                raise GuardError(f"{part}.{name} is a weight that no tensor of the file has a place for")
            if not torch.equal(value, stored.to(value.dtype)):
                if component.full(name) not in component.identity:
                    raise GuardError(f"{part}.{name} is loaded with other values than the file's")
                taken.append(f"{part}.{name}")
            count += 1
    rest = f"; not {', '.join(taken)}, which diffusers takes for the identity, ComfyUI as it is" if taken else ""
    return f"bit for bit, {count} weights{rest}"
