"""The shipped folder: it is what it says, and good enough."""

from __future__ import annotations

import warnings

import pytest
import torch
from PIL import Image

from finetune.tinyworld import BASE, Judge, gates, world
from finetune.tinyworld.build import LIMIT, shipped_bytes
from finetune.tinyworld.subject import instance_pictures, subject
from finetune.tinyworld.training.export import load, sample
from finetune.tinyworld.unseen import unseen_captions

pytestmark = pytest.mark.base


@pytest.fixture(scope="module")
def judge() -> Judge:
    torch.set_num_threads(1)
    return Judge.load()


@pytest.fixture(scope="module")
def base():  # type: ignore[no-untyped-def]
    return load()


def test_everything_shipped_is_smaller_than_the_limit() -> None:
    assert 0 < shipped_bytes() < LIMIT


def test_the_folder_loads_as_an_ordinary_pipeline_without_warnings() -> None:
    from diffusers import StableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline = StableDiffusionPipeline.from_pretrained(BASE)
    assert pipeline.safety_checker is None
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    assert pipeline.text_encoder.config.eos_token_id == pipeline.tokenizer.eos_token_id
    assert pipeline.scheduler.config.clip_sample is False


def test_pictures_survive_the_autoencoder(base) -> None:  # type: ignore[no-untyped-def]
    assert gates.psnr(base.vae, 16) > 28


def test_scaled_latents_have_unit_variance(base) -> None:  # type: ignore[no-untyped-def]
    pictures = torch.stack([torch.from_numpy(world.render_arrays(s)[0].copy()) for _, _, s in unseen_captions(32)])
    with torch.no_grad():
        mean = base.vae.encode(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mean
    assert float((mean * base.vae.config.scaling_factor).std()) == pytest.approx(1, abs=0.1)


def test_the_judge_reads_rendered_pictures(judge: Judge) -> None:
    assert gates.oracle_accuracy(judge, 100)["all"] > 0.985


def test_the_judge_tells_individuals_of_a_class_apart(judge: Judge) -> None:
    cast = [subject(seed) for seed in range(400, 424)]
    pictures = [picture for one in cast for picture in instance_pictures(one)[:2]]
    same, other = gates.likeness(judge.embed(pictures), cast)
    assert same - other > 0.4


def test_judging_does_not_depend_on_the_order_of_pictures(judge: Judge) -> None:
    pictures = instance_pictures(subject(1))
    torch.testing.assert_close(judge.embed(pictures).flip(0), judge.embed(pictures[::-1]))
    assert torch.allclose(judge.embed(pictures).norm(dim=1), torch.ones(5))


def test_prompt_accuracy_is_the_share_of_what_is_named(judge: Judge) -> None:
    scene = unseen_captions(1)[0][2]
    picture = world.render(scene)[0]
    wrong = {"background": "at night" if scene.background != "at night" else "on snow"}
    read = judge.prompt_accuracy([picture] * 3, [{"shape": scene.shape}, {"shape": scene.shape} | wrong, {}])
    assert read.tolist() == [1, 0.5, 1]
    with pytest.raises(ValueError, match="1 pictures to judge by 2"):
        judge.prompt_accuracy([picture], [{}, {}])
    with pytest.raises(ValueError, match="colour: beige"):
        judge.prompt_accuracy([picture], [{"colour": "beige"}])


def test_pictures_of_any_size_are_judged(judge: Judge) -> None:
    picture = instance_pictures(subject(1))[0]
    large = picture.resize((128, 128), Image.Resampling.NEAREST).convert("RGBA")
    torch.testing.assert_close(judge.embed([large]), judge.embed([picture]))


def test_same_seed_same_picture_whatever_the_batch(base) -> None:  # type: ignore[no-untyped-def]
    both = sample(base, ["a red star", "a blue ring on snow"], seed=3, steps=4)
    again = sample(base, ["a red star", "a blue ring on snow"], seed=3, steps=4)
    alone = sample(base, ["a red star"], seed=3, steps=4)
    assert torch.equal(both, again)
    torch.testing.assert_close(both[:1], alone, atol=1e-3, rtol=0)


def test_the_base_draws_what_a_few_captions_say(base, judge: Judge) -> None:  # type: ignore[no-untyped-def]
    assert gates.base_accuracy(base, judge, 16)["all"] > 0.8


@pytest.mark.slow
def test_the_base_draws_what_200_captions_say(base, judge: Judge) -> None:  # type: ignore[no-untyped-def]
    assert gates.base_accuracy(base, judge, 200)["all"] >= 0.9


@pytest.mark.slow
def test_the_judge_passes_its_gates(base, judge: Judge) -> None:  # type: ignore[no-untyped-def]
    failed = [gate for gate in gates.judge_gates(judge, base.vae) if not gate.passed]
    assert not failed, failed


@pytest.mark.slow
def test_a_bare_class_prompt_has_a_broad_prior(base, judge: Judge) -> None:  # type: ignore[no-untyped-def]
    read = judge.attribute_names(sample(base, ["a star"] * 32))
    assert sum(each["shape"] == "star" for each in read) >= 24
    for name, values in {"colour": 5, "fill": 3, "background": 4, "position": 4}.items():
        assert len({each[name] for each in read}) >= values
