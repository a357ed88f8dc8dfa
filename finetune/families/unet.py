"""What families with diffusers' cross-attention U-Net and CLIP text encoders have in common."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CLIPTextConfig

from finetune.errors import UserError
from finetune.families.folder import DiffusersFolder, Part
from finetune.objective import DDPM

READERS = ("attn2.to_k", "attn2.to_v")
"""Layers that read the prompt."""

Patterns = Mapping[str, Mapping[str, Sequence[str]]]

_ATTENTION = [r".*\.attn[12]\.to_(q|k|v|out\.0)"]
_WIDE = [*_ATTENTION, r".*\.attentions\.\d+\.proj_(in|out)", r".*\.ff\.net\.(0\.proj|2)"]
_CONV = [*_WIDE, r".*\.resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)", r".*\.(down|up)samplers\.0\.conv"]
CLIP_ATTENTION = [r".*\.self_attn\.(q|k|v|out)_proj"]
CLIP_WIDE = [*CLIP_ATTENTION, r".*\.mlp\.fc[12]"]
CLIP_LAYERS = [r"(^|\.)encoder\.", r"(^|\.)final_layer_norm\."]
_NORMS = [r"norm\w*\.weight$", r"bias$"]


def linears(text_encoders: Sequence[str]) -> Patterns:
    """``Sites.linears`` of a U-Net with these text encoders."""
    unet = {
        "attention": _ATTENTION,
        "cross-attention": [r".*\.attn2\.to_(q|k|v|out\.0)"],
        "cross-kv": [r".*\.attn2\.to_[kv]"],
        "wide": _WIDE,
        "conv": _CONV,
    }
    text = {preset: CLIP_WIDE if preset in ("wide", "conv") else CLIP_ATTENTION for preset in unet}
    return _beside(unet, text, text_encoders)


def selections(text_encoders: Sequence[str]) -> Patterns:
    """``Sites.selections`` of a U-Net with these text encoders."""
    unet = {
        "all": [""],
        "attention": [r"\.attn[12]\."],
        "cross-attention": [r"\.attn2\."],
        "cross-kv": [r"\.attn2\.to_[kv]\."],
        "norm-bias": _NORMS,
        "down": [r"^down_blocks\."],
        "mid": [r"^mid_block\."],
        "up": [r"^up_blocks\."],
    }
    text = {preset: {"all": [""], "norm-bias": _NORMS}.get(preset, CLIP_LAYERS) for preset in unet}
    return _beside(unet, text, text_encoders)


def _beside(
    unet: Mapping[str, Sequence[str]], text: Mapping[str, Sequence[str]], text_encoders: Sequence[str]
) -> Patterns:
    return {preset: {"denoiser": found, **dict.fromkeys(text_encoders, text[preset])} for preset, found in unet.items()}


def refuse_inpainting(family: DiffusersFolder) -> None:
    """Refuse a U-Net that reads more than latents.

    Raises:
        UserError: it does.
    """
    if family.settings["denoiser"].get("in_channels", 4) != family.settings["vae"].get("latent_channels", 4):
        raise UserError(f"{family.folder}: the U-Net does not read plain latents; inpainting models cannot be trained")


def ddpm(folder: Path, scheduler: Any, min_snr_gamma: float | None) -> DDPM:
    """What the model was trained on, as its scheduler says it.

    Raises:
        UserError: the scheduler is none of discrete-time diffusion, or contradicts its prediction.
    """
    table, prediction = getattr(scheduler, "alphas_cumprod", None), scheduler.config.get("prediction_type")
    if table is None or prediction not in ("epsilon", "v_prediction", "sample"):
        raise UserError(f"{folder / 'scheduler'}: {type(scheduler).__name__} with prediction {prediction!r} is unknown")
    # some samplers replace the zero by a tiny number, so the table alone does not tell
    if prediction == "epsilon" and scheduler.config.get("rescale_betas_zero_snr"):
        raise UserError(
            f"{folder / 'scheduler'}: epsilon prediction cannot be trained with zero terminal SNR; "
            "the model needs prediction_type v_prediction"
        )
    return DDPM(table.float(), prediction, min_snr_gamma)


@functools.cache
def missing_level(part: Part) -> str:
    """The level that the installed transformers leaves out of a CLIP text encoder's names: "text_model." or nothing."""
    kind = getattr(transformers, part.kind.split(".")[1])
    with torch.device("meta"):
        config = CLIPTextConfig(hidden_size=4, intermediate_size=4, num_hidden_layers=0, num_attention_heads=1)
        return "" if hasattr(kind(config), "text_model") else "text_model."
