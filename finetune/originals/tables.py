"""The tables by the class of diffusers' model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from finetune.originals import Places, flux, sd3, unet

TABLES: Mapping[str, Callable[[Mapping[str, Any]], Places]] = {
    "UNet2DConditionModel": unet.places,
    "FluxTransformer2DModel": flux.places,
    "SD3Transformer2DModel": sd3.places,
}
