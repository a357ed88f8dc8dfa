"""What Z-Image has and others have not: a template, prompts of their own lengths, time counted from noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.adapter import Weights
from finetune.adapters import attach
from finetune.batch import Conditioning
from finetune.config.adapters import EmbeddingConfig, LoraConfig
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.export.full import write_model
from finetune.families import load_family, z_image
from finetune.families.tokens import check_trigger, rare_tokens
from finetune.family import ModelFamily
from finetune.objectives import Flow
from finetune.randomness import generator

WORD = EmbeddingConfig.model_validate(
    {"kind": "embedding", "tokens": [{"token": "<zib>", "initializer": "star circle", "vectors": 2}]}
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return z_image.tiny(tmp_path_factory.mktemp("z-image") / "model")


def load(folder: Path, **settings: Any) -> ModelFamily:
    family = load_family(ModelConfig(path=str(folder), **settings))
    family.require("denoiser", *family.text_encoders)
    return family


def test_prompts_are_as_long_as_their_templates(folder: Path) -> None:
    family = load(folder)
    captions = ["", "a star", "a large striped red star on grass"]
    prompts = family.encode_prompt(captions)
    lengths = [family.prompt_length(caption) for caption in captions]
    assert prompts.lengths == tuple(lengths) and lengths == sorted(set(lengths))
    assert [family.caption_overflow(caption) for caption in captions] == [0, 0, 0]
    long = " ".join(["a"] * 600)
    assert family.caption_overflow(long) == family.prompt_length("a") + 599 - 512
    assert family.encode_prompt([long]).tokens.shape[1] == 512


def test_nothing_said_is_the_prompt_that_guides_away(folder: Path) -> None:
    family = load(folder)
    pipeline: Any = family.pipeline()
    _, away = pipeline.encode_prompt("a star", do_classifier_free_guidance=True)
    assert torch.equal(away[0], family.encode_prompt([""]).tokens[0])


def test_a_step_of_the_pipeline_follows_the_answer(folder: Path) -> None:
    """The sign: an Euler step towards the picture goes against ``eps - x0``, which the objective asks for."""
    family = load(folder)
    assert isinstance(family.process, Flow)
    pipeline: Any = family.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=generator(0, "noise"))
    drawn = pipeline(
        "a star", height=16, width=16, latents=noise, num_inference_steps=1, output_type="latent", **family.guided(1)
    ).images
    with torch.no_grad():
        answer = family.predict(noise, torch.tensor([1000.0]), family.encode_prompt(["a star"]), torch.zeros(1, 6))
    torch.testing.assert_close(drawn, noise - answer)  # from sigma 1 to sigma 0


@pytest.mark.parametrize(("scale", "told"), [(1.0, 0.0), (0.0, 0.0), (5.0, 4.0)])
def test_guidance_counts_as_everywhere(folder: Path, scale: float, told: float) -> None:
    assert load_family(ModelConfig(path=str(folder))).guided(scale) == {"guidance_scale": told}


def test_new_words_take_the_place_of_known_ones(folder: Path) -> None:
    """With the vectors of " star" and " circle" they are read as these words are, in training and by the pipeline."""
    family = load(folder)
    known = family.encode_prompt(["a photo of star circle on grass"])
    ahead = family.prompt_length("a photo of <zib> on grass", {"<zib>": 2})
    attach(WORD, family, seed=0)
    with torch.no_grad():
        assert torch.equal(family.encode_prompt(["a photo of <zib> on grass"]).tokens, known.tokens)
        pipeline: Any = family.pipeline()
        own, _ = pipeline.encode_prompt(["a photo of <zib> on grass"])
    assert torch.equal(own[0], known.tokens[0])
    assert ahead == known.tokens.shape[1] == family.prompt_length("a photo of <zib> on grass")


def test_an_initializer_of_several_tokens_is_refused_with_a_near_one(folder: Path) -> None:
    words = {"kind": "embedding", "tokens": [{"token": "<zib>", "initializer": "stra"}]}
    with pytest.raises(UserError, match="did you mean 'star'"):
        attach(EmbeddingConfig.model_validate(words), load(folder), seed=0)


def test_gradients_are_those_without_checkpointing(folder: Path) -> None:
    found = []
    for checkpointing in (False, True):
        family = load(folder)
        adapter = attach(WORD, family, seed=0)
        if checkpointing:
            family.enable_gradient_checkpointing()
        family.networks.train()
        prompt = family.encode_prompt(["a <zib>"])
        noisy = torch.randn(1, 4, 8, 8, generator=generator(0, "noisy"))
        family.predict(noisy, torch.tensor([300.0]), prompt, torch.zeros(1, 6)).square().mean().backward()  # type: ignore[no-untyped-call]
        found.append([value.grad for group in adapter.groups() for value in group.parameters.values()])
    for plain, kept in zip(*found, strict=True):
        assert plain is not None and kept is not None and plain.any()
        torch.testing.assert_close(plain, kept)


def test_prompts_of_one_length_go_together(folder: Path) -> None:
    family = load(folder)
    noisy, times = torch.randn(2, 4, 8, 8, generator=generator(0, "noisy")), torch.tensor([300.0, 700.0])
    prompts = family.encode_prompt(["a red star", "a blue ring"])
    assert prompts.lengths is None
    with torch.no_grad():
        both = family.predict(noisy, times, prompts, torch.zeros(2, 6))
        for row in range(2):
            own = Conditioning(tokens=prompts.tokens[row : row + 1])
            alone = family.predict(noisy[row : row + 1], times[row : row + 1], own, torch.zeros(1, 6))
            torch.testing.assert_close(both[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_the_template_is_part_of_the_model(folder: Path, tmp_path: Path) -> None:
    """An exported folder holds it, and encoded prompts do not outlive a change of it."""
    family = load(folder)
    name, parameter = next(iter(family.networks["denoiser"].named_parameters()))
    trained = Weights("full", {f"denoiser.{name}": parameter.detach() + 1})
    written = write_model(trained, folder, tmp_path / "model", family.export_names, torch.float32)
    again = load(written)
    assert torch.equal(again.encode_prompt(["a star"]).tokens, family.encode_prompt(["a star"]).tokens)
    before = again.fingerprint("text_encoder")
    template = written / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("assistant", "artist"), encoding="utf-8")
    assert again.fingerprint("text_encoder") != before


def test_rare_tokens_are_words_behind_a_space(folder: Path) -> None:
    family = load_family(ModelConfig(path=str(folder)))
    rare = [token.word for token in rare_tokens(family.sites.vocabularies[0].tokenizer, count=4)]
    assert "hux" in rare
    assert check_trigger(family, "hux", "a star") == []
    assert "tokens (s + k + sq), a rare single one" in check_trigger(family, "sksq", "a star")[0]


def test_what_has_no_place_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="prompt_chunks: 2 has no place in z-image"):
        load_family(ModelConfig(path=str(folder), prompt_chunks=2))
    config = LoraConfig.model_validate({"kind": "lora", "rank": 2, "text_encoder": True})
    with pytest.raises(UserError, match=r"adapter\.text_encoder: must be false for z-image"):
        attach(config, load(folder), seed=0)
