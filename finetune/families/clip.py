"""The space that a CLIP text encoder shares with pictures (Radford et al. 2021, https://arxiv.org/abs/2103.00020)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel

from finetune import tinyworld
from finetune.errors import UserError
from finetune.family import SharedSpace

SD1 = "openai/clip-vit-large-patch14"
"""The CLIP whose text tower Stable Diffusion 1.x reads prompts with."""

_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)  # of CLIP's training pictures
_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
_AT_ONCE = 16  # pictures


def shared_space(encoder: nn.Module, clip: str | None) -> SharedSpace:
    """The CLIP that ``encoder`` is the text tower of.

    Args:
        encoder: a ``CLIPTextModel``.
        clip: a folder or hub name of transformers' ``CLIPModel``; the embedded base's own where it is not given.

    Raises:
        UserError: no CLIP is named or found, or its text tower is another network than ``encoder``.
    """
    found = encoder_digest(encoder)
    if clip is None:
        if found != _embedded_digest():
            raise UserError(
                f"adapter.clip is missing: name the CLIP of the text encoder; Stable Diffusion 1.x has {SD1}"
            )
        from finetune.tinyworld.towers import Towers

        towers = Towers.load()
        return SharedSpace("tinyworld", found, towers.text_projection.weight.detach(), towers.embed)
    model = _load(clip)
    if encoder_digest(model.text_model) != found:
        raise UserError(
            f"adapter.clip: the text tower of {clip} is not the base's text encoder, so that its pictures lie in "
            f"another space than the base's prompts; Stable Diffusion 1.x has {SD1}"
        )
    return SharedSpace(clip, found, model.text_projection.weight.detach(), lambda pictures: _embed(model, pictures))


def text_projection(encoder: nn.Module, clip: str | None) -> Tensor:
    """``SharedSpace.projection`` of ``encoder``, where ``clip`` is Stable Diffusion 1.x's if the sizes are.

    Raises:
        UserError: as ``shared_space``.
    """
    width = encoder.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    return shared_space(encoder, clip or (SD1 if width == 768 else None)).projection


def encoder_digest(encoder: nn.Module) -> str:
    """Hex digest that tells one text encoder from another, whatever its precision and its place in a model.

    Left out are the embedding table, which new words enlarge, and what a LoRA has added. Numbers count as rounded to
    float16, so that a model's copies in float32 and float16 are one.
    """
    bare = getattr(encoder, "text_model", encoder)
    digest = hashlib.sha256()
    weights = {name.replace(".base_layer", ""): value for name, value in bare.named_parameters()}
    for name in sorted(weights):
        if "token_embedding" not in name and ".lora_" not in name:
            digest.update(name.encode())
            digest.update(weights[name].detach().to("cpu", torch.float16).numpy().tobytes())
    return digest.hexdigest()


@cache
def _embedded_digest() -> str:
    encoder: Any = CLIPTextModel.from_pretrained(tinyworld.BASE, subfolder="text_encoder", local_files_only=True)
    return encoder_digest(encoder)


def _load(clip: str) -> Any:
    try:
        model: Any = CLIPModel.from_pretrained(clip, use_safetensors=True, torch_dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"adapter.clip: {clip!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _embed(model: Any, pictures: Sequence[Image.Image]) -> Tensor:
    side = model.config.vision_config.image_size
    parts = []
    for start in range(0, len(pictures), _AT_ONCE):
        pixels = torch.stack([_pixels(picture, side) for picture in pictures[start : start + _AT_ONCE]])
        parts.append(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output))
    return torch.cat(parts)


def _pixels(picture: Image.Image, side: int) -> Tensor:
    """A picture as CLIP was shown it: the central square, bicubic, float32 [3, side, side], normalised by channel."""
    scale = side / min(picture.size)
    width, height = (max(side, round(length * scale)) for length in picture.size)
    left, top = (width - side) // 2, (height - side) // 2
    scaled = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    values = np.asarray(scaled.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
    return torch.from_numpy((values - _MEAN) / _STD).permute(2, 0, 1)
