"""Aesthetic embeddings in files: our own safetensors, and the bare tensor that A1111's extension reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from finetune.adapter import Weights
from finetune.aesthetic import Aesthetic, Attached, attach
from finetune.errors import UserError
from finetune.export.read import Identity, identify, read_pickle, read_tensors
from finetune.families.clip import encoder_digest, text_projection

EMBEDDING, PROJECTION = "image_embedding", "text_projection"
HEADER = "aesthetic."
"""Before the method's own entries in a file's header."""


def weights_of(aesthetic: Aesthetic, clip: str, encoder: str, pictures: int) -> Weights:
    """An embedding at rest.

    Args:
        clip: the CLIP of its space. encoder: digest of the text encoder that it is for. pictures: whose mean it is.
    """
    settings = {
        "clip_model": clip,
        "encoder": encoder,
        "num_images": str(pictures),
        "normalized": "false",
        "steps": str(aesthetic.steps),
        "learning_rate": repr(aesthetic.learning_rate),
        "weight": repr(aesthetic.weight),
        "mix": aesthetic.mix,
    }
    tensors = {EMBEDDING: aesthetic.embedding, PROJECTION: aesthetic.projection}
    return Weights("aesthetic", {name: tensor.detach().cpu() for name, tensor in tensors.items()}, settings)


def load_aesthetic(
    pipeline: Any,
    file: str | Path,
    *,
    weight: float | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    mix: Literal["lerp", "slerp"] | None = None,
    clip: str | None = None,
) -> Attached:
    """Let a ``StableDiffusionPipeline`` draw with an aesthetic embedding: for each prompt a copy of its text encoder
    takes a few steps towards it.

        with finetune.load_aesthetic(pipeline, "sunset.safetensors"):
            pipeline("a castle by the sea").images[0].save("castle.png")

    The pipeline's own weights are never touched. Without ``with``, ``remove()`` of the answer ends it.

    Args:
        file: of this toolkit, or a ``.pt`` of A1111's aesthetic-gradients extension.
        weight: share of the adapted encoding, 0 to 1.
        steps, learning_rate: of Adam, for each prompt.
        mix: straight (``lerp``) or on the arc (``slerp``).
        clip: whose text tower the pipeline's encoder is, a hub name or a folder; needed for a ``.pt`` alone, and not
            for Stable Diffusion 1.x. What else is not given is as the file says, or as in a recipe.

    Raises:
        UserError: the file is no aesthetic embedding, it is for another text encoder or pipeline, or a value cannot be.
    """
    found = identify(Path(file))
    if found.kind != "aesthetic":
        raise UserError(f"{file}: holds no aesthetic embedding; it is of kind {found.kind}")
    encoder = getattr(pipeline, "text_encoder", None)
    if encoder is None:
        raise UserError(f"{type(pipeline).__name__} has no text encoder, which an aesthetic embedding needs")
    header = said(found)
    if wanted := header.get("encoder"):
        require_encoder(found, wanted, encoder_digest(encoder))
    tensors = read(found)
    if PROJECTION not in tensors:
        tensors[PROJECTION] = text_projection(encoder, clip or header.get("clip_model"))
    given = {"weight": weight, "steps": steps, "learning_rate": learning_rate, "mix": mix}
    aesthetic = _aesthetic(found, tensors, {name: value for name, value in given.items() if value is not None})
    return attach(pipeline, aesthetic)


def said(found: Identity) -> dict[str, str]:
    """The method's own entries in a file's header, without their prefix; none in a ``.pt``."""
    return {name.removeprefix(HEADER): text for name, text in found.metadata.items() if name.startswith(HEADER)}


def read(found: Identity) -> dict[str, Tensor]:
    """The tensors of a file, float32; of a ``.pt`` the embedding alone, [1, d].

    Raises:
        UserError: it holds something else.
    """
    if found.path.suffix == ".safetensors":
        tensors = read_tensors(found.path)
    else:
        tensors = {EMBEDDING: cast(Tensor, read_pickle(found.path))}
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    held = tensors[EMBEDDING]
    tensors[EMBEDDING] = held[None] if held.ndim == 1 else held
    if held.ndim not in (1, 2) or len(tensors[EMBEDDING]) != 1 or not bool(torch.isfinite(held).all()):
        raise UserError(f"{found.path}: {list(held.shape)} is no embedding; expected finite numbers [1, d]")
    return tensors


def require_encoder(found: Identity, wanted: str, there: str) -> None:
    """Refuse a text encoder that an embedding is not for.

    Raises:
        UserError: the digests differ.
    """
    if wanted != there:
        base = f", that of {found.base}" if found.base else ""
        raise UserError(
            f"{found.path}: is for another text encoder{base}: digest {wanted[:12]}, here {there[:12]}; "
            "an encoder in bfloat16 cannot be told, load it in float32 or float16"
        )


def _aesthetic(found: Identity, tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> Aesthetic:
    kinds = {"weight": float, "steps": int, "learning_rate": float, "mix": str}
    settings = {name: kinds[name](text) for name, text in said(found).items() if name in kinds} | dict(given)
    aesthetic = Aesthetic(tensors[EMBEDDING], tensors[PROJECTION], **settings)
    if tensors[EMBEDDING].shape[1] != tensors[PROJECTION].shape[0]:
        sizes = f"{tensors[EMBEDDING].shape[1]} numbers, the space has {tensors[PROJECTION].shape[0]}"
        raise UserError(f"{found.path}: lies in the space of another CLIP: {sizes}")
    if not 0 <= aesthetic.weight <= 1:
        raise UserError(f"weight is {aesthetic.weight:g}; the share of the adapted encoding is from 0 to 1")
    if aesthetic.steps < 0 or not aesthetic.learning_rate > 0 or aesthetic.mix not in ("lerp", "slerp"):
        raise UserError(
            f"steps {aesthetic.steps}, learning rate {aesthetic.learning_rate:g}, mix {aesthetic.mix!r}; expected 0 or "
            "more steps, a positive rate, and lerp or slerp"
        )
    return aesthetic
