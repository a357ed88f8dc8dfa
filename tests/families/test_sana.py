"""What Sana has and others have not: an instruction that is read and left out, prompts in lower case, an autoencoder
without variance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.adapters import attach
from finetune.config.adapters import EmbeddingConfig
from finetune.config.schema import ModelConfig, SamplerConfig
from finetune.errors import UserError
from finetune.families import load_family, sana
from finetune.family import ModelFamily
from finetune.objectives import Flow
from finetune.randomness import generator
from finetune.sampling import draw

CAPTIONS = ["a star", "a large striped red star on grass"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sana.tiny(tmp_path_factory.mktemp("sana") / "model")


def load(folder: Path) -> ModelFamily:
    family = load_family(ModelConfig(path=str(folder)))
    family.require("denoiser", *family.text_encoders)
    return family


def noise(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=generator(0, "noise"))


def test_nothing_said_is_the_prompt_that_guides_away(folder: Path) -> None:
    """What is masked may differ: the pipeline pads it without regard to the instruction's length."""
    family, times, geometry = load(folder), torch.tensor([500.0]), torch.zeros(1, 6)
    with torch.no_grad():
        _, _, away, mask = family.pipeline().encode_prompt("a star", do_classifier_free_guidance=True)
        nothing = family.encode_prompt([""])
        assert torch.equal(mask.bool(), nothing.mask) and mask.sum() == 1
        torch.testing.assert_close(away[mask.bool()], nothing.tokens[nothing.mask])
        theirs = type(nothing)(tokens=away, mask=mask.bool())
        answers = [family.predict(noise(), times, prompt, geometry) for prompt in (theirs, nothing)]
    torch.testing.assert_close(*answers)


def test_the_instruction_is_read_and_counted_but_not_passed_on(folder: Path) -> None:
    family: Any = load(folder)
    prompts = family.encode_prompt(CAPTIONS)
    assert prompts.lengths is None and prompts.tokens.shape[1] == family.prompt_length("a star") == 300
    lengths = prompts.mask.sum(dim=1).tolist()
    assert lengths[1] == lengths[0] + 5 and lengths[0] < 10
    assert family.caption_overflow("a star") == 0
    words = [family.caption_overflow(" ".join(["star"] * count)) for count in (310, 311)]
    assert words[1] == words[0] + 1 and 0 < words[0] < 20


def test_masked_tokens_change_nothing(folder: Path) -> None:
    family, times, geometry = load(folder), torch.tensor([300.0, 700.0]), torch.zeros(2, 6)
    with torch.no_grad():
        prompts = family.encode_prompt(CAPTIONS)
        blind = prompts.tokens.masked_fill(~prompts.mask[..., None], 7.0)
        both = family.predict(noise(2), times, prompts, geometry)
        changed = family.predict(noise(2), times, type(prompts)(tokens=blind, mask=prompts.mask), geometry)
    torch.testing.assert_close(both, changed)


def test_prompts_and_words_are_in_lower_case(folder: Path) -> None:
    family = load(folder)
    assert torch.equal(family.encode_prompt(["A Star "]).tokens, family.encode_prompt(["a star"]).tokens)
    words = {"kind": "embedding", "tokens": [{"token": "<Zib>", "initializer": "star"}]}
    with pytest.raises(UserError, match=r"'<Zib>' would never be read: .*; write '<zib>'"):
        attach(EmbeddingConfig.model_validate(words), family, seed=0)


def test_pictures_are_latents_without_variance(folder: Path) -> None:
    family = load(folder)
    family.require("vae")
    pixels = torch.rand(1, 3, 16, 32, generator=generator(0, "pixels")) * 2 - 1
    vae: Any = family.networks["vae"]
    with torch.no_grad():
        expected = vae.encode(pixels).latent
    posterior = family.encode_image(pixels)
    assert posterior.mean.shape == (1, 4, 8, 16)
    torch.testing.assert_close(posterior.sample(torch.ones_like(expected)), expected)
    assert torch.equal(family.scale(posterior.mean), expected * vae.config.scaling_factor)


def test_times_are_shifted_as_the_scheduler_shifts_them(folder: Path) -> None:
    process = load_family(ModelConfig(path=str(folder))).process
    assert isinstance(process, Flow)
    sigma = torch.tensor([0.5], dtype=torch.float64)
    assert process.shift(sigma, (8, 8)).item() == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))


def test_pictures_are_drawn_at_the_size_that_is_asked_for(folder: Path) -> None:
    (picture,) = draw(load(folder), ["a star"], 1, SamplerConfig(steps=1, guidance=2.0), seed=0, resolution=32)
    assert picture.size == (32, 32)
