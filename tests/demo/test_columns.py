"""Columns of the demo: the base at 0, what ``finetune sample`` draws at 1, for every kind of adapter."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
from exported_methods import METHODS

from finetune.config.schema import ModelConfig, SamplerConfig
from finetune.demo.columns import Columns, Settings, strengths_of
from finetune.errors import UserError
from finetune.export.sample import sample
from finetune.randomness import generator

PROMPT = "a photo of zib star"
SAMPLER = SamplerConfig(steps=2, guidance=3.0)


def settings(*strengths: float, **others) -> Settings:
    return Settings(strengths, seed=3, sampler=SAMPLER, **others)


def equal(one, other) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def plain(base, **options):
    """What the untouched model draws for anybody."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    rng = generator(3, "sample", 0, 0)
    return pipeline(PROMPT, generator=rng, num_inference_steps=2, guidance_scale=3.0, **options).images[0]


@pytest.mark.parametrize("method", [method for method in METHODS if method != "full"])
def test_0_is_the_base_and_1_what_sample_draws(method, exported, tiny_sd):
    run = exported(method)
    columns = Columns(run)
    drawn = dict(columns(PROMPT, settings(0.0, 1.0)))
    again = dict(columns(PROMPT, settings(1.0, 0.0)))  # and in the other order
    assert equal(drawn[0.0], plain(tiny_sd)) and equal(again[0.0], drawn[0.0])
    (wanted,) = sample(run, [PROMPT], seed=3, sampler=SAMPLER)
    assert equal(drawn[1.0], wanted) and equal(again[1.0], wanted)
    if method not in ("embedding",):  # whose word is not in the prompt
        assert not equal(drawn[0.0], drawn[1.0])


@pytest.mark.parametrize("method", ["lora", "dora", "lokr", "hypernetwork"])
def test_between_and_beyond_as_sample_draws_too(method, exported):
    run = exported(method)
    for strength, picture in Columns(run)(PROMPT, settings(0.5, 0.0, 1.5, 0.5)):
        (wanted,) = sample(run, [PROMPT], seed=3, sampler=SAMPLER, strength=strength)
        assert equal(picture, wanted), strength


def test_a_new_word_is_used_at_1(exported, tiny_sd):
    prompt = "a photo of <zib>"
    drawn = dict(Columns(exported("embedding"))(prompt, settings(0.0, 1.0)))
    assert not equal(drawn[0.0], drawn[1.0])


def test_what_fits_a_kind_is_known(exported):
    wanted = {"lora": (0.0, 0.5, 1.0), "oft": (0.0, 1.0), "embedding": (0.0, 1.0), "pivotal": (0.0, 0.5, 1.0)}
    assert {method: Columns(exported(method)).strengths for method in wanted} == wanted
    whole = Columns(exported("full"))
    assert whole.strengths == (1.0,) and len(list(whole(PROMPT, settings(1.0)))) == 1
    with pytest.raises(UserError, match="no strength but 1"):
        list(whole(PROMPT, settings(0.0)))


def test_the_prompt_is_filled_in(exported):
    columns = Columns(exported("lora"))
    assert (columns.prompt, columns.title) == ("a photo of <zib> star", "zib")


def test_a_negative_prompt_reaches_the_pipeline(exported, tiny_sd):
    columns = Columns(exported("lora"))
    ((_, picture),) = columns(PROMPT, settings(0.0, negative="grass"))
    assert equal(picture, plain(tiny_sd, negative_prompt="grass")) and not equal(picture, plain(tiny_sd))
    with pytest.raises(UserError, match="needs guidance above 1"):
        list(columns(PROMPT, Settings((0.0,), negative="grass", sampler=SamplerConfig(steps=1, guidance=1.0))))


def test_the_base_is_held_as_it_is_asked_for(exported, tiny_sd):
    run, half = exported("lora"), ModelConfig(dtype="bfloat16")
    drawn = dict(Columns(run, held=half)(PROMPT, settings(0.0, 1.0)))
    (wanted,) = sample(run, [PROMPT], seed=3, sampler=SAMPLER, held=half)
    assert equal(drawn[1.0], wanted) and not equal(drawn[0.0], plain(tiny_sd))


def test_strengths_are_numbers():
    assert strengths_of("0, 0.5,1") == (0.0, 0.5, 1.0)
    with pytest.raises(UserError, match="expected numbers with commas"):
        strengths_of("0;1")
