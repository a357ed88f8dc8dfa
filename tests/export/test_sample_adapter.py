"""Pictures from a file are those that diffusers draws with it."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest

from finetune.config.schema import SamplerConfig
from finetune.errors import UserError
from finetune.export import export
from finetune.export.sample import sample
from finetune.randomness import generator

SAMPLER = SamplerConfig(steps=3, guidance=4.0)
PROMPTS = ["a photo of zib star", "a photo of a star"]


def plain(base, adapter, seed=3, resolution=None):
    """What anybody who never heard of this toolkit would write."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(base)
    if adapter:
        pipeline.load_lora_weights(adapter)
    return [
        pipeline(prompt, generator=generator(seed, "sample", i, j), num_inference_steps=3, guidance_scale=4.0).images[0]
        for i, prompt in enumerate(PROMPTS)
        for j in range(2)
    ]


def equal(a, b):
    return len(a) == len(b) and all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


def draw(path, **options):
    return sample(path, PROMPTS, seed=3, sampler=SAMPLER, count=2, **options)


@pytest.fixture
def paths(trained, recipe, tmp_path):
    family, adapter = trained(rank=4, alpha=8.0, targets="conv", text_encoder=True)
    return export(adapter.weights(), family, recipe(), tmp_path / "zib" / "adapters")


def test_same_pictures_as_diffusers_bit_for_bit(paths, tiny_sd):
    for path in paths:
        assert equal(draw(path), plain(tiny_sd, str(path)))


def test_whole_model_too(tiny_sd, trained, recipe, tmp_path):
    family, adapter = trained("full", text_encoder=True)
    (path,) = export(adapter.weights(), family, recipe(adapter={"kind": "full"}), tmp_path)
    assert equal(draw(path), plain(path, None))
    with pytest.raises(UserError, match="whole model"):
        draw(path, strength=0.5)
    with pytest.raises(UserError, match="needs no base"):
        draw(path, base=str(tiny_sd))


def test_strength_zero_is_the_base_and_a_run_folder_names_its_file(paths, tiny_sd):
    untouched, full = plain(tiny_sd, None), draw(paths[0].parents[1])
    assert equal(draw(paths[0], strength=0.0), untouched)
    assert not equal(full, untouched)
    assert not equal(draw(paths[0], strength=0.5), full)


def test_adapter_of_another_base_is_refused(paths, tmp_path):
    from finetune.families import tiny

    width, tiny.WIDTH = tiny.WIDTH, 32
    try:
        other = tiny.write_tiny_sd(tmp_path / "other")
    finally:
        tiny.WIDTH = width
    with pytest.raises(UserError, match="does not fit"):
        draw(paths[0], base=str(other))
