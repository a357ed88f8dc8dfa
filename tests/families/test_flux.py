"""What Flux has and others have not: guidance that the denoiser is told, packed latents, positions, two lengths."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import nn

from finetune.adapters import attach
from finetune.adapters.select import select
from finetune.batch import Conditioning
from finetune.config.adapters import EmbeddingConfig, LoraConfig
from finetune.config.objective import ObjectiveConfig
from finetune.config.schema import DataConfig, ModelConfig, SamplerConfig
from finetune.data.encode import Prompts
from finetune.errors import UserError
from finetune.families import flux, load_family
from finetune.families.two_streams import linears
from finetune.objectives import Flow
from finetune.objectives.shifts import Dynamic, unshifted
from finetune.randomness import generator
from finetune.sampling import draw

SINGLE = r"single_transformer_blocks\.\d+\.proj_(mlp|out)"


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux.tiny(tmp_path_factory.mktemp("dev") / "model")


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux.tiny(tmp_path_factory.mktemp("schnell") / "model", guidance_embeds=False)


def load(folder: Path, objective: ObjectiveConfig | None = None) -> flux.Flux:
    family = load_family(ModelConfig(path=str(folder)), objective)
    assert isinstance(family, flux.Flux)
    family.require("denoiser", *family.text_encoders)
    return family


def asked(family: flux.Flux) -> dict[str, Any]:
    """What the denoiser is asked."""
    questions: list[dict[str, Any]] = []
    hook = family.networks["denoiser"].register_forward_pre_hook(
        lambda _, __, named: questions.append(named), with_kwargs=True
    )
    prompt = Conditioning(tokens=torch.zeros(3, 4, 16), pooled=torch.zeros(3, 16))
    with torch.no_grad():
        family.predict(torch.zeros(3, 4, 4, 8), torch.tensor([1000.0, 500.0, 1.0]), prompt, torch.zeros(3, 6))
    hook.remove()
    return questions[0]


def test_dev_is_told_guidance_and_its_own_times(dev: Path) -> None:
    told = asked(load(dev))
    assert told["guidance"].tolist() == [1.0] * 3
    torch.testing.assert_close(told["timestep"], torch.tensor([1.0, 0.5, 0.001]))
    assert told["img_ids"].tolist() == [[0, row, column] for row in range(2) for column in range(4)]
    assert not told["txt_ids"].any()


def test_another_guidance_is_asked_with(dev: Path) -> None:
    assert asked(load(dev, ObjectiveConfig(guidance=3.5)))["guidance"].tolist() == [3.5] * 3


def test_schnell_is_told_none(schnell: Path) -> None:
    assert asked(load(schnell))["guidance"] is None
    with pytest.raises(UserError, match=r"objective\.guidance: is for guidance-distilled models"):
        load(schnell, ObjectiveConfig(guidance=1.0))


def test_times_are_shifted_as_the_pipeline_shifts_them(dev: Path, schnell: Path) -> None:
    guided, other = load(dev).process, load(schnell).process
    assert isinstance(guided, Flow) and isinstance(guided.shift, Dynamic)
    assert guided.shift.mu((128, 128)) == pytest.approx(1.15)  # 1024 pixels: 4096 tokens
    assert isinstance(other, Flow) and other.shift is unshifted


def test_packing_is_the_pipelines() -> None:
    latents = torch.randn(2, 4, 6, 8, generator=generator(0, "latents"))
    tokens = FluxPipeline._pack_latents(latents, *latents.shape)
    assert torch.equal(flux.packed(latents), tokens)
    assert torch.equal(flux.unpacked(tokens, 6, 8), latents)
    assert torch.equal(flux.places(3, 4), FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32))


@torch.no_grad()
def test_schnell_reads_half_as_many_tokens_in_pictures_too(schnell: Path) -> None:
    family = load(schnell)
    found = family.encode_prompt(["a star"])
    assert found.tokens.shape[1] == family.prompt_length("a star") == 256
    published = FluxPipeline.from_pretrained(schnell, local_files_only=True)
    for pipeline, told in ((family.pipeline(), {}), (published, {"max_sequence_length": 256})):
        tokens, pooled, _ = pipeline.encode_prompt("a star", None, **told)
        assert torch.equal(tokens, found.tokens) and torch.equal(pooled, found.pooled)  # type: ignore[arg-type]


@torch.no_grad()
def test_schnell_is_asked_what_its_pipeline_asks(schnell: Path) -> None:
    family = load(schnell)
    family.require("vae")
    pipeline: Any = FluxPipeline.from_pretrained(schnell, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    answers: list[Any] = []
    pipeline.transformer.register_forward_hook(lambda *call: answers.append(call[-1][0]))
    noise = torch.randn(1, 4, 8, 8, generator=generator(0, "noise"))
    options = {"max_sequence_length": 256, "num_inference_steps": 1, "output_type": "latent"}
    pipeline("a star", height=16, width=16, latents=flux.packed(noise), **options)
    time = pipeline.scheduler.timesteps[:1]
    answer = family.predict(noise, time, family.encode_prompt(["a star"]), torch.zeros(1, 6))
    assert torch.equal(flux.packed(answer), answers[0])


def test_encoded_prompts_of_other_lengths_have_other_names(dev: Path, schnell: Path) -> None:
    """Dev and schnell share their text encoders' files, and may share a cache."""
    config = DataConfig.model_validate({"resolution": 16, "concepts": [{"folder": "x"}]})
    keys = []
    for folder in (dev, schnell):
        family = load(folder)
        family.fingerprint = lambda *_: "the same"  # type: ignore[method-assign]
        keys.append(Prompts(family, config).key("a star"))
    assert keys[0] != keys[1]


def test_a_rescale_that_the_pipeline_has_not_is_refused(dev: Path) -> None:
    family = load(dev)
    with pytest.raises(UserError, match="guidance_rescale: FluxPipeline has none"):
        draw(family, ["a star"], 1, SamplerConfig(steps=1, guidance_rescale=0.7), seed=0, resolution=16)
    (picture,) = draw(family, ["a star"], 1, SamplerConfig(steps=1), seed=0, resolution=16)
    assert picture.size == (16, 16)


def test_captions_are_cut_where_t5_ends(dev: Path, schnell: Path) -> None:
    text = "star " * 400
    assert (load(dev).caption_overflow(text), load(schnell).caption_overflow(text)) == (0, 400 + 1 - 256)


def test_layers_of_t5_do_not_train(dev: Path) -> None:
    config = LoraConfig.model_validate({"kind": "lora", "rank": 2, "text_encoder": True, "targets": "wide"})
    names = attach(config, load(dev), seed=0).weights().tensors
    assert {name.split(".")[0] for name in names} == {"denoiser", "text_encoder"}
    assert not [name for name in names if name.startswith("denoiser.proj_out")], "the last layer is no block's"


@pytest.mark.parametrize(("preset", "count"), [("attention", 266), ("context", 76), ("wide", 418)])
def test_presets_reach_the_layers_of_the_published_model(preset: str, count: int) -> None:
    """19 blocks of 8 attention and 4 feed-forward layers, 38 of 3 and 2."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel()
    names = [name for name, part in transformer.named_modules() if isinstance(part, nn.Linear)]
    match = "adapter.targets", preset, linears(("text_encoder",), SINGLE), "denoiser", names
    assert len(select(*match, re.Pattern.fullmatch)) == count


def test_an_initializer_that_t5_cuts_up_is_refused(dev: Path) -> None:
    family = load(dev)
    words = {"kind": "embedding", "tokens": [{"token": "<zib>", "initializer": "z"}]}  # a token to CLIP
    with pytest.raises(UserError, match=r"'z' is ▁ \+ z to the text_encoder_2"):
        attach(EmbeddingConfig.model_validate(words), family, seed=0)
