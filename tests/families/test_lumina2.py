"""What Lumina-Image 2.0 has and others have not: an instruction, prompts that are padded and masked, time counted from
noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.schema import ModelConfig
from finetune.families import load_family, lumina2
from finetune.family import ModelFamily
from finetune.objectives import Flow
from finetune.randomness import generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lumina2.tiny(tmp_path_factory.mktemp("lumina2") / "model")


def load(folder: Path) -> ModelFamily:
    family = load_family(ModelConfig(path=str(folder)))
    family.require("denoiser", *family.text_encoders)
    return family


def test_nothing_said_is_the_prompt_that_guides_away(folder: Path) -> None:
    family = load(folder)
    pipeline: Any = family.pipeline()
    with torch.no_grad():
        *_, away, mask = pipeline.encode_prompt("a star", do_classifier_free_guidance=True)
        nothing = family.encode_prompt([""])
    assert torch.equal(away, nothing.tokens) and torch.equal(mask.bool(), nothing.mask)
    assert nothing.mask.sum() == 1, "a text's beginning, without the instruction"


def test_captions_are_counted_with_the_instruction(folder: Path) -> None:
    family: Any = load(folder)
    prompts = family.encode_prompt(["a star", "a large striped red star on grass"])
    assert prompts.lengths is None and prompts.tokens.shape[1] == family.prompt_length("a star") == 256
    assert prompts.mask.sum(dim=1).tolist() == [family.count("a star"), family.count("a star") + 5]
    words = [family.caption_overflow(" ".join(["star"] * count)) for count in (256, 257)]
    assert words[1] == words[0] + 1 and words[0] == family.count("star") + 255 - 256 > 0


def test_masked_tokens_change_nothing(folder: Path) -> None:
    """Prompts of unlike length are asked together, and a short one is padded once more inside the transformer."""
    family = load(folder)
    noisy = torch.randn(2, 4, 8, 8, generator=generator(0, "noisy"))
    times, geometry = torch.tensor([300.0, 700.0]), torch.zeros(2, 6)
    with torch.no_grad():
        prompts = family.encode_prompt(["a star", "a large striped red star on grass"])
        both = family.predict(noisy, times, prompts, geometry)
        for row in range(2):
            only = torch.tensor([row])
            alone = family.predict(noisy[only], times[only], prompts.rows(only), geometry[only])
            torch.testing.assert_close(both[only], alone)
        blind = prompts.tokens.masked_fill(~prompts.mask[..., None], 7.0)
        changed = type(prompts)(tokens=blind, mask=prompts.mask)
        torch.testing.assert_close(family.predict(noisy, times, changed, geometry), both)


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
