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
"""FLUX.2, Z-Image, Qwen-Image, Lumina 2 and Sana are left out: the names that ComfyUI and kohya's tools look for have
not been read in those tools' code, and what they do not find they drop without a word.
"""
