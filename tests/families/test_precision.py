"""Networks in half precision: near the float32 ones, told times exactly, float32 at their border."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.batch import Conditioning
from finetune.config.schema import DataConfig, ModelConfig
from finetune.data.encode import Latents, Prompts
from finetune.errors import UserError
from finetune.families import load_family, sdxl
from finetune.family import ModelFamily
from finetune.randomness import generator

GEOMETRY = torch.tensor([[1367, 911, 3, 0, 16, 16]])


@pytest.fixture(scope="module")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl.tiny(tmp_path_factory.mktemp("sdxl") / "model")


def family(folder: Path, **model: object) -> ModelFamily:
    torch.set_num_threads(1)
    return load_family(ModelConfig.model_validate({"path": str(folder), **model}))


@torch.no_grad()
def answer(found: ModelFamily, prompt: Conditioning | None = None) -> Tensor:
    found.require("denoiser", *found.text_encoders)
    noisy = torch.randn(1, 4, 8, 8, generator=generator(0, "noisy"))
    return found.predict(noisy, torch.tensor([999]), prompt or found.encode_prompt(["a red star"]), GEOMETRY)


def test_a_half_network_answers_nearly_the_same_in_float32(tiny_sdxl: Path) -> None:
    half, whole = family(tiny_sdxl, dtype="bfloat16"), family(tiny_sdxl)
    ours, theirs = answer(half), answer(whole)
    assert ours.dtype == torch.float32
    assert 0 < (ours - theirs).norm() / theirs.norm() < 0.03
    for name in ("denoiser", *half.text_encoders):
        assert {one.dtype for one in half.networks[name].parameters()} == {torch.bfloat16}


def test_sizes_and_times_reach_the_denoiser_unrounded(tiny_sdxl: Path) -> None:
    found = family(tiny_sdxl, dtype="bfloat16")
    found.require("denoiser")
    told: list[Tensor] = []
    denoiser: Any = found.networks["denoiser"]
    for part in (denoiser.add_time_proj, denoiser.time_proj):
        part.register_forward_pre_hook(lambda _, inputs: told.append(inputs[0]))
    answer(found)
    time, sizes = told
    assert time.tolist() == [999]
    assert sizes.tolist() == GEOMETRY.flatten().tolist()


def test_prompts_and_latents_of_other_arithmetic_have_other_entries(tiny_sd: Path, tmp_path: Path) -> None:
    data = DataConfig.model_validate({"concepts": [{"folder": "x"}], "cache": {"folder": str(tmp_path)}})
    plain = family(tiny_sd)
    for model, prompts, latents in (
        ({"dtype": "bfloat16"}, True, False),
        ({"vae_dtype": "bfloat16"}, False, True),
        ({"vae_tiling": True}, False, True),
        ({"block_swap": 2}, False, False),
    ):
        other = family(tiny_sd, **model)
        assert (Prompts(other, data).key("a") != Prompts(plain, data).key("a")) == prompts, model
        assert (Latents(other, data)._encoder != Latents(plain, data)._encoder) == latents, model


def test_a_prompt_of_a_half_encoder_is_kept_in_halves(tiny_sd: Path, tmp_path: Path) -> None:
    data = DataConfig.model_validate({"concepts": [{"folder": "x"}], "cache": {"folder": str(tmp_path)}})
    found = family(tiny_sd, dtype="bfloat16")
    prompt = Prompts(found, data).get("a red star")
    assert prompt.tokens.dtype == torch.bfloat16
    assert torch.equal(answer(found, prompt), answer(found))


def test_an_autoencoder_that_overflows_is_not_taken_in_float16(tiny_sd: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "model"))
    settings = folder / "vae" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"force_upcast": True}))
    with pytest.raises(UserError, match=r"vae_dtype is float16.*force_upcast; bfloat16"):
        family(folder, vae_dtype="float16").require("vae")
    family(folder, vae_dtype="bfloat16").require("vae")


def test_large_pictures_are_encoded_in_tiles(tiny_sd: Path) -> None:
    pixels = torch.rand(1, 3, 64, 64, generator=generator(0, "pixels")) * 2 - 1
    means, sizes = [], []
    for tiling in (False, True):
        found = family(tiny_sd, vae_tiling=tiling)
        found.require("vae")
        encoder: Any = found.networks["vae"].encoder
        encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-1]))
        means.append(found.encode_image(pixels).mean)
    assert sizes[0] == 64
    assert len(sizes) > 2
    assert max(sizes[1:]) <= 16
    assert means[0].shape == means[1].shape


@pytest.mark.parametrize(
    "model", [{"dtype": "bfloat16"}, {"vae_dtype": "bfloat16"}, {"dtype": "bfloat16", "vae_dtype": "bfloat16"}]
)
def test_pipelines_draw(tiny_sdxl: Path, model: dict[str, object]) -> None:
    pipeline = family(tiny_sdxl, **model).pipeline()
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline("a star", num_inference_steps=2, height=16, width=16, output_type="np").images
    assert drawn.shape == (1, 16, 16, 3)
