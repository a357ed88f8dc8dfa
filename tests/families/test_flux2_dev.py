"""What FLUX.2 dev has and klein has not: a Mistral asked by a processor, a guidance that its denoiser is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from transformers import ProcessorMixin

from finetune.config.objective import ObjectiveConfig
from finetune.config.schema import ModelConfig
from finetune.export.embedding import ALONE, Stored
from finetune.export.words import load_word
from finetune.families import flux2_dev, load_family
from finetune.families.tiny_mistral import TEMPLATE, tokenizer
from finetune.family import ModelFamily
from finetune.randomness import generator

LONG = " ".join(["star"] * 600)


class Processor(ProcessorMixin):
    """What of ``PixtralProcessor`` looks at text; the class itself is not to be had without torchvision."""

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux2_dev.tiny(tmp_path_factory.mktemp("flux2-dev") / "model")


def load(folder: Path, guidance: float | None = None) -> ModelFamily:
    family = load_family(ModelConfig(path=str(folder)), ObjectiveConfig(guidance=guidance))
    family.require("denoiser", *family.text_encoders)
    return family


@pytest.mark.parametrize("caption", ["", "a star", "a [IMG] star", LONG])
def test_the_processor_of_the_pipeline_makes_the_same_tokens(folder: Path, caption: str) -> None:
    theirs = Processor(tokenizer(), TEMPLATE).apply_chat_template(
        format_input([caption]),
        tokenize=True,
        return_dict=True,
        padding="max_length",
        truncation=True,
        max_length=512,
    )
    family: Any = load_family(ModelConfig(path=str(folder)))
    ours = family.told([caption], padding="max_length")
    assert ours["input_ids"] == theirs["input_ids"] and ours["attention_mask"] == theirs["attention_mask"]


def test_captions_are_counted_with_the_conversation_around_them(folder: Path) -> None:
    family = load_family(ModelConfig(path=str(folder)))
    assert family.caption_overflow("") == 0
    words = [family.caption_overflow(" ".join(["star"] * count)) for count in (600, 601)]
    assert words[1] == words[0] + 1 > 88
    assert family.caption_overflow(LONG + " <zib>", {"<zib>": 3}) == words[0] + 3


def test_the_denoiser_is_told_the_guidance(folder: Path) -> None:
    noisy = torch.randn(1, 4, 8, 8, generator=generator(0, "noisy"))
    answers = []
    for guidance in (None, 1.0, 3.5):
        family = load(folder, guidance)
        with torch.no_grad():
            prompt = family.encode_prompt(["a star"])
            answers.append(family.predict(noisy, torch.tensor([500.0]), prompt, torch.zeros(1, 6)))
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[1], answers[2])


def test_a_word_is_put_into_the_tokenizer_within_a_processor(folder: Path) -> None:
    with_processor, plain = load(folder).pipeline(), load(folder).pipeline()
    with_processor.tokenizer = Processor(with_processor.tokenizer, TEMPLATE)
    rows = torch.randn(2, 8, generator=generator(0, "rows"))
    found = []
    for pipeline in (with_processor, plain):
        before, _ = pipeline.encode_prompt("a <zib> star")
        load_word(pipeline, Stored("<zib>", {ALONE: rows}))
        found.append(pipeline.encode_prompt("a <zib> star")[0])
        assert not torch.equal(found[-1], before)
    assert torch.equal(*found)
