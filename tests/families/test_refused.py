"""Stable Diffusion folders that cannot be used, each refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from diffusers import AutoencoderKL

from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import load_family
from finetune.family import ModelFamily


def load(folder: Path) -> ModelFamily:
    return load_family(ModelConfig(path=str(folder)))


def test_inpainting_models_are_refused(editable: Path) -> None:
    settings = editable / "unet/config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "in_channels": 9}))
    with pytest.raises(UserError, match="inpainting"):
        load(editable)


def test_pickled_weights_are_not_opened(editable: Path) -> None:
    vae = AutoencoderKL.from_pretrained(editable / "vae")
    (editable / "vae/diffusion_pytorch_model.safetensors").unlink()
    vae.save_pretrained(editable / "vae", safe_serialization=False)
    with pytest.raises(UserError, match="cannot be loaded"):
        load(editable).require("vae")


def test_a_damaged_file_is_named(editable: Path) -> None:
    file = editable / "unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="unet"):
        load(editable).require("denoiser")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_a_missing_part_is_named(editable: Path, part: str) -> None:
    shutil.rmtree(editable / part)
    with pytest.raises(UserError, match=part):
        load(editable)
