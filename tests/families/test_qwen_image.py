"""What Qwen-Image has and others have not: films of one frame, a template whose beginning is dropped, a mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.adapters import attach
from finetune.batch import Conditioning
from finetune.config.adapters import EmbeddingConfig, LoraConfig
from finetune.config.schema import ModelConfig, SamplerConfig
from finetune.families import load_family, qwen_image
from finetune.family import ModelFamily
from finetune.objectives import Flow
from finetune.objectives.shifts import Dynamic
from finetune.randomness import generator
from finetune.sampling import arguments, draw, inference


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_image.tiny(tmp_path_factory.mktemp("qwen-image") / "model")


def load(folder: Path, *networks: str) -> ModelFamily:
    family = load_family(ModelConfig(path=str(folder)))
    family.require(*networks or ("denoiser", *family.text_encoders))
    return family


def test_a_picture_is_encoded_as_the_first_frame_of_a_film(folder: Path) -> None:
    family = load(folder, "vae")
    pixels = torch.rand(2, 3, 16, 24, generator=generator(0, "pixels")) * 2 - 1
    found = family.encode_image(pixels)
    vae: Any = family.networks["vae"]
    with torch.no_grad():
        film = vae.encode(pixels[:, :, None]).latent_dist
    assert found.mean.shape == (2, 4, 8, 12) and torch.equal(found.mean, film.mean[:, :, 0])
    assert torch.equal(found.logvar, film.logvar[:, :, 0])


def test_latents_are_scaled_by_what_the_pipeline_takes_back(folder: Path) -> None:
    family = load(folder, "vae")
    settings = family.networks["vae"].config  # type: ignore[union-attr]
    latents = torch.randn(1, 4, 2, 2, generator=generator(0, "latents"))
    mean, std = (torch.tensor(settings[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))  # type: ignore[index]
    torch.testing.assert_close(family.scale(latents) * std + mean, latents)


def test_only_what_follows_the_beginning_of_the_template_is_read(folder: Path) -> None:
    family = load(folder)
    captions = ["", "a star", "a large striped red star"]
    prompts = family.encode_prompt(captions)
    lengths = [family.prompt_length(caption) for caption in captions]
    assert prompts.lengths == tuple(lengths)
    assert [length - lengths[0] for length in lengths] == [0, 2, 5]
    long = " ".join(["a"] * 1200)
    assert family.caption_overflow(long) == lengths[0] + 1200 - 1024
    assert family.encode_prompt([long]).tokens.shape[1] == family.prompt_length(long) == 1024


def test_padding_changes_no_answer(folder: Path) -> None:
    """Prompts of unlike length in one pass: the mask keeps what makes them alike from the denoiser."""
    family = load(folder)
    noisy, times = torch.randn(2, 4, 8, 8, generator=generator(0, "noisy")), torch.tensor([300.0, 700.0])
    prompts = family.encode_prompt(["a star", "a large striped red star"])
    assert prompts.lengths is not None
    with torch.no_grad():
        both = family.predict(noisy, times, prompts, torch.zeros(2, 6))
        for row, length in enumerate(prompts.lengths):
            own = Conditioning(tokens=prompts.tokens[row : row + 1, :length])
            alone = family.predict(noisy[row : row + 1], times[row : row + 1], own, torch.zeros(1, 6))
            torch.testing.assert_close(both[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_guidance_leads_away_from_the_empty_prompt(folder: Path) -> None:
    family = load(folder)
    assert family.guided(1.0) == {"true_cfg_scale": 1.0, "negative_prompt": None}
    assert family.guided(4.0, 2) == {"true_cfg_scale": 4.0, "negative_prompt": ["", ""]}
    with inference(family) as pipeline:
        away, mask = pipeline.encode_prompt(family.guided(4.0)["negative_prompt"])
        assert mask is None and torch.equal(away, family.encode_prompt([""]).tokens)
        settings = arguments(family, pipeline, SamplerConfig(steps=1), prompts=2)
        drawn = pipeline(["a star", "a ring"], **settings, height=16, width=16, output_type="latent").images
        assert len(drawn) == 2
    pictures = [draw(family, ["a star"], 1, SamplerConfig(steps=1, guidance=scale), 0, None, 16) for scale in (1, 4)]
    assert pictures[0][0].tobytes() != pictures[1][0].tobytes()


def test_times_shift_with_the_size_as_the_scheduler_says(folder: Path) -> None:
    process = load_family(ModelConfig(path=str(folder))).process
    assert isinstance(process, Flow) and process.shift == Dynamic(0.5, 0.9, 256, 8192, patch=2)


def test_layers_that_nothing_reads_are_left_out(folder: Path) -> None:
    family = load(folder)
    config = LoraConfig.model_validate({"kind": "lora", "rank": 2, "targets": "blocks"})
    names = attach(config, family, seed=0).weights().tensors
    last = [name for name in names if ".1.attn." in name or ".1.txt_mlp." in name]
    assert any("add_k_proj" in name for name in last)
    assert not [name for name in last if "add_q_proj" in name or "to_add_out" in name or "txt_mlp" in name]
    assert [name for name in names if ".0.attn.to_add_out" in name]


def test_new_words_take_the_place_of_known_ones(folder: Path) -> None:
    family = load(folder)
    known = family.encode_prompt(["a photo of star circle on grass"])
    ahead = family.prompt_length("a photo of <zib> on grass", {"<zib>": 2})
    words = {"kind": "embedding", "tokens": [{"token": "<zib>", "initializer": "star circle", "vectors": 2}]}
    attach(EmbeddingConfig.model_validate(words), family, seed=0)
    with torch.no_grad():
        assert torch.equal(family.encode_prompt(["a photo of <zib> on grass"]).tokens, known.tokens)
    assert ahead == known.tokens.shape[1]
