"""Changes put into a pipeline's weights for good: for files that diffusers has no loader for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import GuardError, UserError
from finetune.export.lycoris import Change
from finetune.export.lycoris_kohya import unpack
from finetune.family import ExportNames

# component of a pipeline -> its prefixes in kohya's files
_PREFIXES = {
    "unet": ("lora_unet",),
    "transformer": ("lora_unet",),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
    "text_encoder_3": ("lora_te3",),
}


@torch.no_grad()
def merge(pipeline: Any, tensors: Mapping[str, Tensor], strength: float = 1.0) -> int:
    """Add what a file of layout kohya changes, ``strength`` times, and return how many layers that were.

    Raises:
        UserError: the pipeline has no such layer, or one of another size.
    """
    places = dict(_places(pipeline))
    found = _read(tensors)
    for change in found:
        stem = f"{change.network}_{change.module.replace('.', '_')}"
        weight = getattr(places.get(stem), "weight", None)
        if weight is None:
            raise UserError(f"the pipeline has no layer {stem}")
        if not weight.is_floating_point() or hasattr(places[stem], "codes"):
            raise UserError(f"the layer {stem} is quantised, so that nothing can be added to its weight")
        try:
            weight.copy_(change.changed(weight, strength))
        except GuardError as error:
            raise UserError(str(error)) from error
    return len(found)


def _read(tensors: Mapping[str, Tensor]) -> Sequence[Change]:
    """The file's layers, whose networks are here called by their prefixes."""
    prefixes = {prefix for found in _PREFIXES.values() for prefix in found}
    return unpack(tensors, {prefix: ExportNames(prefix, prefix) for prefix in sorted(prefixes)})


def _places(pipeline: Any) -> Iterator[tuple[str, nn.Module]]:
    """Key stems and the layers that they mean, with and without the level that transformers has dropped."""
    for component, prefixes in _PREFIXES.items():
        network = getattr(pipeline, component, None)
        if not isinstance(network, nn.Module):
            continue
        for path, module in network.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                for prefix in prefixes:
                    for level in ("", "text_model."):
                        yield f"{prefix}_{level}{path}".replace(".", "_"), module
