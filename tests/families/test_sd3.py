"""What SD 3 has and others have not: a T5 that may be absent, latents that are shifted, a stream that ends early."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn

from finetune.adapters import attach
from finetune.adapters.select import select
from finetune.config.adapters import EmbeddingConfig, LoraConfig
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import load_family, sd3
from finetune.families.two_streams import linears
from finetune.family import ModelFamily
from finetune.randomness import generator

LONG = "a large striped red star on grass, " * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3.tiny(tmp_path_factory.mktemp("sd3") / "model")


@pytest.fixture
def without_t5(folder: Path, tmp_path: Path) -> Path:
    changed = Path(shutil.copytree(folder, tmp_path / "model"))
    index = changed / "model_index.json"
    absent = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    index.write_text(json.dumps({**json.loads(index.read_text()), **absent}))
    for name in absent:
        shutil.rmtree(changed / name)
    return changed


def load(folder: Path, **settings: Any) -> ModelFamily:
    family = load_family(ModelConfig(path=str(folder), **settings))
    family.require("denoiser", *family.text_encoders)
    return family


def published(folder: Path) -> Any:
    """The pipeline as everybody loads it."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if index[name] == [None, None]}
    return StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True, **absent)


@torch.no_grad()
def test_nothing_said_is_the_pipelines_unconditional_prompt(folder: Path) -> None:
    found = load(folder).encode_prompt(["", "a star"])
    said, away, pooled, away_pooled = published(folder).encode_prompt("a star", None, None)
    for mine, theirs in zip((found.tokens, found.pooled), ((away, said), (away_pooled, pooled)), strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, torch.cat(theirs))


@torch.no_grad()
def test_without_t5_zeros_stand_in_its_place(folder: Path, without_t5: Path) -> None:
    family = load(without_t5)
    assert family.text_encoders == ("text_encoder", "text_encoder_2")
    found = family.encode_prompt(["a star"])
    own, _, pooled, _ = published(without_t5).encode_prompt("a star", None, None, do_classifier_free_guidance=False)
    assert torch.equal(found.tokens, own) and torch.equal(found.pooled, pooled)  # type: ignore[arg-type]
    assert found.tokens.shape == load(folder).encode_prompt(["a star"]).tokens.shape
    assert not found.tokens[:, 24:].any()
    family.pipeline()


def test_without_t5_words_are_the_clips(without_t5: Path) -> None:
    family = load(without_t5)
    words = {"kind": "embedding", "tokens": [{"token": "<zib>", "initializer": "star"}]}
    tensors = attach(EmbeddingConfig.model_validate(words), family, seed=0).weights().tensors
    assert {family.export_names[name.split(".")[0]].words for name in tensors} == {"clip_l", "clip_g"}


def test_captions_are_cut_where_no_encoder_reads_on(folder: Path, without_t5: Path) -> None:
    whole, clips = load(folder), load(without_t5)
    assert whole.caption_overflow(LONG) == 0
    assert clips.caption_overflow(LONG) == 40 - 22
    assert whole.caption_overflow("star " * 300) == 300 + 1 - 256
    assert whole.caption_overflow("a <zib>, red " * 100, {"<zib>": 3}) == 100 * 7 + 1 - 256
    assert whole.prompt_length("a star") == whole.encode_prompt(["a star"]).tokens.shape[1]


def test_the_overflow_of_new_words_is_foreseen(folder: Path) -> None:
    family = load(folder)
    text = "a <zib>, red " * 100
    ahead = family.caption_overflow(text, {"<zib>": 1})
    words = {"kind": "embedding", "tokens": [{"token": "<zib>", "initializer": "star"}]}
    attach(EmbeddingConfig.model_validate(words), family, seed=0)
    assert family.caption_overflow(text) == ahead


def test_chunks_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"model\.prompt_chunks: 2 has no place in sd3: .*T5"):
        load(folder, prompt_chunks=2)


def test_latents_are_shifted_and_scaled(folder: Path) -> None:
    family, latents = load(folder), torch.randn(1, 4, 2, 2, generator=generator(0, "latents"))
    torch.testing.assert_close(family.scale(latents), (latents - 0.0609) * 1.5305)


def test_t5_reads_without_dropout_while_it_trains(folder: Path) -> None:
    family = load(folder)
    with torch.no_grad():
        still = family.encode_prompt(["a star"]).tokens
        family.networks.train()
        assert torch.equal(family.encode_prompt(["a star"]).tokens, still)


def test_what_nothing_reads_is_left_out(folder: Path) -> None:
    family = load(folder)
    family.networks.requires_grad_(True)
    noisy = torch.randn(1, 4, 8, 8, generator=generator(0, "noisy"))
    answer = family.predict(noisy, torch.tensor([300]), family.encode_prompt(["a star"]), torch.zeros(1, 6))
    answer.square().mean().backward()
    parameters = dict(family.networks["denoiser"].named_parameters())
    unread = [name for name, one in parameters.items() if one.grad is None or not one.grad.any()]
    assert unread == [name for name in parameters if name not in family.sites.read("denoiser", parameters)]
    assert unread == [f"transformer_blocks.1.attn.{part}" for part in (*_linear("add_q_proj"), "norm_added_q.weight")]


def _linear(name: str) -> tuple[str, str]:
    return f"{name}.weight", f"{name}.bias"


def test_layers_of_t5_do_not_train(folder: Path) -> None:
    """Files of LoRAs have no place for them."""
    config = LoraConfig.model_validate({"kind": "lora", "rank": 2, "text_encoder": True})
    assert attach(config, load(folder), seed=0).networks() == {"denoiser", "text_encoder", "text_encoder_2"}


@pytest.mark.parametrize(("preset", "count"), [("attention", 191), ("context", 95), ("wide", 285)])
def test_presets_reach_the_layers_of_sd3_medium(preset: str, count: int) -> None:
    """24 blocks of 8 attention and 4 feed-forward layers; the last has no way back into the prompt's stream."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(num_layers=24, num_attention_heads=24)
    names = [name for name, part in transformer.named_modules() if isinstance(part, nn.Linear)]
    match = "adapter.targets", preset, linears(sd3.CLIPS), "denoiser", names
    assert len(select(*match, re.Pattern.fullmatch)) == count
