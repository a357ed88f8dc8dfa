"""The flow-matching base: a small transformer of its own, and text encoder, tokenizer and autoencoder of the other base."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

HERE = Path(__file__).parent
BASE, CLIP = HERE / "base", HERE / "clip"


def text_encoder() -> CLIPTextModelWithProjection:
    """The text tower of the small CLIP with its projection, float32 on the CPU, frozen.

    The other base has it without the projection, which lies beside the image tower.
    """
    encoder = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(BASE / "text_encoder"))
    encoder.text_model.load_state_dict(load_file(BASE / "text_encoder" / "model.safetensors"))
    encoder.text_projection.load_state_dict({"weight": load_file(CLIP / "towers.safetensors")["text_projection.weight"]})
    return encoder.to(torch.float32).eval().requires_grad_(False)
