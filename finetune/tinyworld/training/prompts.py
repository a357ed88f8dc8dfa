"""Captions of all scenes through the shipped text encoder once, so that a denoiser is trained without one in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.tinyworld.flow_base import text_encoder
from finetune.tinyworld.tokenizer import build as build_tokenizer
from finetune.tinyworld.training import data
from finetune.tinyworld.training.unet import caption_for

WORDINGS = 4
"""Captions of each scene, a tenth of them empty."""


@torch.no_grad()
def encode(folder: Path, batch: int = 500) -> None:
    """Write ``folder/prompts.safetensors``: ``states`` float16 (40000 * WORDINGS, 24, 128), ``pooled`` (…, 64).

    States are those before the encoder's last layer, as SD 3 reads them. Row ``WORDINGS * n + k`` is of scene ``n``.
    """
    scenes, tokenizer = data.training_scenes(folder.parent / "data"), build_tokenizer()
    encoder = text_encoder()
    words = [caption_for(scenes, row, key) for row in range(len(scenes)) for key in range(WORDINGS)]
    states, pooled = [], []
    for start in range(0, len(words), batch):
        ids = tokenizer(words[start : start + batch], padding="max_length", return_tensors="pt").input_ids
        answer = encoder(ids, output_hidden_states=True)
        states.append(answer.hidden_states[-2].half())
        pooled.append(answer.text_embeds.half())
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"states": torch.cat(states), "pooled": torch.cat(pooled)}, folder / "prompts.safetensors")


def load(folder: Path) -> tuple[Tensor, Tensor]:
    """What ``encode`` wrote: states and pooled answers, float16."""
    stored = load_file(folder / "prompts.safetensors")
    return stored["states"], stored["pooled"]
