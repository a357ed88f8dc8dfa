"""Changes put into a pipeline's weights for good: for files that diffusers has no loader for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import GuardError, UserError
from finetune.export.lycoris_kohya import unpack
from finetune.family import ExportNames
from finetune.originals.tables import TABLES

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

    Nothing is written into the tensors that the pipeline held, which others may share.

    Raises:
        UserError: the pipeline has no such layer, or one of another size.
    """
    names = dict(_names(pipeline))
    found = unpack(tensors, names)
    modules: dict[str, dict[str, nn.Module]] = {}
    for change in found:
        component = names[change.network].diffusers
        layer = modules.setdefault(component, dict(getattr(pipeline, component).named_modules())).get(change.module)
        weight = getattr(layer, "weight", None)
        if weight is None:
            raise UserError(f"the pipeline has no layer {component}.{change.module}")
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise UserError(f"the layer {component}.{change.module} is quantised: nothing can be added to its weight")
        try:
            weight.data = change.changed(weight, strength).to(weight)
        except GuardError as error:
            raise UserError(str(error)) from error
    return len(found)


def _names(pipeline: Any) -> Iterator[tuple[str, ExportNames]]:
    """What files call the networks of a pipeline, each under its prefix."""
    for component, prefixes in _PREFIXES.items():
        network = getattr(pipeline, component, None)
        if not isinstance(network, nn.Module):
            continue
        settings: Any = network
        table = TABLES.get(type(network).__name__)
        clip = component.startswith("text_encoder") and "CLIP" in type(network).__name__
        level = "text_model." if clip and not hasattr(network, "text_model") else ""
        for prefix in prefixes:
            yield prefix, ExportNames(component, prefix, level, places=table(settings.config) if table else {})
