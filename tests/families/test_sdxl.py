"""What SDXL has and others have not: two encoders, a pooled answer, times and places of pictures, zeros for nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.adapters import attach
from finetune.config.adapters import EmbeddingConfig, LoraConfig
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import load_family, sdxl
from finetune.family import ModelFamily
from finetune.randomness import generator

LONG = "a large striped red star on grass, " * 5 + "a small blue circle"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl.tiny(tmp_path_factory.mktemp("sdxl") / "model")


def load(folder: Path, **settings: Any) -> ModelFamily:
    family = load_family(ModelConfig(path=str(folder), **settings))
    family.require("denoiser", *family.text_encoders)
    return family


def test_size_and_crop_change_the_answer(folder: Path) -> None:
    family = load(folder)
    prompt = family.encode_prompt(["a star"])
    noisy, time = torch.randn(1, 4, 8, 8, generator=generator(0, "noisy")), torch.tensor([300])
    whole, cut = (family.predict(noisy, time, prompt, torch.tensor([[64, 64, top, 0, 16, 16]])) for top in (0, 24))
    assert not torch.equal(whole, cut)


@pytest.mark.parametrize("zeros", [True, False])
def test_nothing_said_is_zeros_where_the_pipeline_says_so(folder: Path, tmp_path: Path, zeros: bool) -> None:
    changed = Path(shutil.copytree(folder, tmp_path / "model"))
    index = changed / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "force_zeros_for_empty_prompt": zeros}))
    family = load(changed)
    found = family.encode_prompt([""])
    pipeline: Any = family.pipeline()
    _, away, _, pooled = pipeline.encode_prompt("a star", do_classifier_free_guidance=True)
    assert torch.equal(found.tokens, away)
    assert torch.equal(found.pooled, pooled)  # type: ignore[arg-type]
    assert bool(found.tokens.any()) is not zeros
    assert family.encode_prompt(["", "a star"]).tokens[1].any()
    assert (family.fingerprint("text_encoder") == load(folder).fingerprint("text_encoder")) is zeros  # no stale cache
    assert family.fingerprint("vae") == load(folder).fingerprint("vae")


def test_long_prompts_are_drawn_as_they_are_trained(folder: Path) -> None:
    family = load(folder, prompt_chunks=3)
    found = family.encode_prompt([LONG])
    assert found.tokens.shape[1] == family.prompt_length(LONG) > 24
    pipeline: Any = family.pipeline()
    own, away, pooled, away_pooled = pipeline.encode_prompt(LONG, do_classifier_free_guidance=True)
    assert torch.equal(own, found.tokens)
    assert torch.equal(pooled, found.pooled)  # type: ignore[arg-type]
    assert away.shape == own.shape and not away.any() and not away_pooled.any()
    longer = family.encode_prompt([LONG + " and a red line"])
    assert torch.allclose(longer.pooled, found.pooled)  # type: ignore[arg-type]  # of the first chunk, as elsewhere


def test_a_new_word_does_not_move_the_end_of_the_text(folder: Path) -> None:
    """METHODS 0.2: published settings pool at the highest id, which a new word has (its initial row is a known one)."""
    plain = load(folder).encode_prompt(["a photo of a star"]).pooled
    family = load(folder)
    words = {"kind": "embedding", "tokens": [{"token": "<zib>", "initializer": "star"}]}
    attach(EmbeddingConfig.model_validate(words), family, seed=0)
    assert torch.equal(family.encode_prompt(["a photo of a <zib>"]).pooled, plain)  # type: ignore[arg-type]


def test_layers_that_nothing_reads_are_left_out(folder: Path) -> None:
    family = load(folder)
    config = LoraConfig.model_validate({"kind": "lora", "rank": 2, "text_encoder": True})
    names = attach(config, family, seed=0).weights().tensors
    assert not [name for name in names if name.startswith("text_encoder.") and ".layers.1." in name]
    assert [name for name in names if name.startswith("text_encoder_2.") and ".layers.1." in name]


def test_the_refiner_is_refused(folder: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(folder, tmp_path / "model"))
    index = changed / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "text_encoder": [None, None]}))
    with pytest.raises(UserError, match="refiner"):
        load_family(ModelConfig(path=str(changed)))
