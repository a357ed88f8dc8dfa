"""What FLUX.2 klein has and others have not: three depths of a language model, latents normed by tokens, a shift of its
own.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from finetune.config.schema import ModelConfig
from finetune.families import flux2_klein, load_family
from finetune.family import ModelFamily
from finetune.objectives import Flow
from finetune.objectives.shifts import static
from finetune.randomness import generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux2_klein.tiny(tmp_path_factory.mktemp("flux2-klein") / "model")


def load(folder: Path, *networks: str) -> ModelFamily:
    family = load_family(ModelConfig(path=str(folder)))
    family.require(*networks or ("denoiser", *family.text_encoders))
    return family


def test_latents_are_scaled_as_the_pipeline_scales_pictures(folder: Path) -> None:
    family = load(folder, "vae")
    pixels = torch.rand(1, 3, 16, 32, generator=generator(0, "pixels")) * 2 - 1
    pipeline: Any = family.pipeline()
    with torch.no_grad():
        expected = pipeline._encode_vae_image(pixels, generator=None)
    found = family.scale(family.encode_image(pixels).mean)
    assert found.shape == (1, 4, 8, 16)
    assert torch.equal(pipeline._patchify_latents(found), expected)


def test_the_scale_outlives_the_autoencoder(folder: Path) -> None:
    latents = torch.randn(1, 4, 4, 4, generator=generator(0, "latents"))
    held, fresh = load(folder, "vae"), load_family(ModelConfig(path=str(folder)))
    before = held.scale(latents)
    held.release("vae")
    assert torch.equal(held.scale(latents), before) and torch.equal(fresh.scale(latents), before)
    assert len(fresh.networks) == 0


def test_the_scale_is_that_of_the_true_weights(folder: Path) -> None:
    latents = torch.randn(1, 4, 4, 4, generator=generator(0, "latents"))
    halved = load_family(ModelConfig(path=str(folder), vae_dtype="bfloat16"))
    halved.require("vae")
    assert torch.equal(halved.scale(latents), load(folder, "vae").scale(latents))


@pytest.mark.parametrize("size", [(32, 32), (64, 128), (144, 144)])
def test_times_are_shifted_as_the_pipeline_shifts_them(folder: Path, size: tuple[int, int]) -> None:
    process = load_family(ModelConfig(path=str(folder))).process
    assert isinstance(process, Flow)
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    mu = torch.tensor(compute_empirical_mu(size[0] * size[1] // 4, 50), dtype=torch.float64)
    torch.testing.assert_close(process.shift(sigma, size), static(sigma, size, float(mu.exp())))


def test_every_prompt_is_of_one_length_and_reads_three_depths(folder: Path) -> None:
    family = load(folder)
    prompts = family.encode_prompt(["", "a large striped red star on grass"])
    assert prompts.tokens.shape == (2, 512, 3 * 8) and prompts.lengths is None
    depths = prompts.tokens.split(8, dim=-1)
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(depths))
    assert family.caption_overflow("a star") == 0
    words = [family.caption_overflow(" ".join(["a"] * count)) for count in (600, 601)]
    assert words[1] == words[0] + 1 > 88


def test_nothing_said_is_the_prompt_that_guides_away(folder: Path) -> None:
    family = load(folder)
    pipeline: Any = family.pipeline()
    away, _ = pipeline.encode_prompt("")
    assert torch.equal(away, family.encode_prompt([""]).tokens)


@pytest.mark.parametrize("distilled", [False, True])
def test_a_distilled_model_takes_no_guidance(folder: Path, tmp_path: Path, distilled: bool) -> None:
    changed = Path(shutil.copytree(folder, tmp_path / "model"))
    index = changed / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "is_distilled": distilled}))
    pipeline: Any = load(changed).pipeline()
    pipeline.set_progress_bar_config(disable=True)
    asked = []
    pipeline.transformer.register_forward_hook(lambda *_: asked.append(1))
    pipeline(prompt="a star", height=16, width=16, num_inference_steps=1, guidance_scale=4.0, output_type="latent")
    assert len(asked) == (1 if distilled else 2)
