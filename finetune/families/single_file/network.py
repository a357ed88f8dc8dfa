"""A network's weights within a single file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from finetune.errors import UserError
from finetune.families.parts import Part
from finetune.families.single_file.checkpoint import Checkpoint
from finetune.families.single_file.layouts import DENOISER
from finetune.families.single_file.template import Template
from finetune.originals import Place
from finetune.originals.tensors import take


@dataclass(frozen=True)
class Network:
    """Where each weight of a network stands in a file.

    Attributes:
        places: by names in diffusers' files.
        blanks: the weights on the meta device, in the dtype that they are read in, by the same names.
    """

    checkpoint: Checkpoint
    places: Mapping[str, Place]
    blanks: Mapping[str, Tensor]

    @property
    def keys(self) -> set[str]:
        """Of the tensors in the file that make it."""
        return {place.path for place in self.places.values() if place.path in self.checkpoint.tensors}

    def read(self, file: safe_open, name: str) -> Tensor:
        """A weight."""
        place = self.places[name]
        if place.path in self.checkpoint.tensors:
            return take(place, self.checkpoint.tensors[place.path].read(file))
        return torch.eye(*self.blanks[name].shape, dtype=self.blanks[name].dtype)


def network(checkpoint: Checkpoint, beside: Template, part: Part) -> Network:
    """Find a network's weights in a file that holds it.

    Raises:
        UserError: one is missing or of another shape, or the denoiser has more of them.
    """
    settings, component = beside.settings(part), checkpoint.layout.components[part.subfolder]
    weights = {component.full(name): value for name, value in weights_of(part, settings).items()}
    places, tensors = checkpoint.layout.places(part.subfolder, weights, settings), checkpoint.tensors
    where, advice = f"{checkpoint.path}: {part.subfolder}", f"; {_advice(beside)}"
    missing = sorted({places[name].path for name in weights if name not in component.identity} - tensors.keys())
    if missing:
        raise UserError(f"{where} lacks {len(missing)} tensors, for example {missing[0]!r}{advice}")
    blanks = {}
    for name, place in places.items():
        wanted = weights[name].to(checkpoint.dtype)
        blanks[name] = take(place, tensors[place.path].blank) if place.path in tensors else wanted
        if blanks[name].shape != wanted.shape:
            found, expected = list(blanks[name].shape), list(wanted.shape)
            raise UserError(f"{where}: {place.path!r} makes a weight of {found}; expected {expected}{advice}")
    held = Network(checkpoint, places, blanks)
    own = {key for key in tensors if key.startswith(DENOISER)} if component.prefix == DENOISER else set()
    if more := sorted(own - held.keys):
        raise UserError(f"{where} has {len(more)} tensors too many, for example {more[0]!r}{advice}")
    return held


def weights_of(part: Part, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """``weights_in`` a network of these settings, on the meta device."""
    library, _ = part.kind.split(".")
    with torch.device("meta"):
        built: nn.Module = (
            part.type.from_config(dict(settings))
            if library == "diffusers"
            else part.type(part.type.config_class(**settings))
        )
    return weights_in(built)


def weights_in(module: nn.Module) -> dict[str, Tensor]:
    """A module's weights, and what else its files hold, by their names; of those that are one, the first."""
    stored = module.state_dict()
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: value.detach() for name, value in found.items() if name in stored and value.is_floating_point()}


def _advice(beside: Template) -> str:
    return f"it is not of the sizes of {beside.source}: name a diffusers folder of its kind with model.like"
