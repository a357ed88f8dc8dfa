"""The measure of a style is 1 in the style, 0 on plain pictures, low in other styles, and blind to content."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import tinyworld
from finetune.evaluation.styles import Scale, readable, undone
from finetune.tinyworld import Scene, Style, render, rng, style

SEEDS = (201, 202, 203, 204, 206)
Pictures = list[Image.Image]


def scenes(seed: int, count: int = 16, **named: str) -> list[Scene]:
    return [Scene.having(dict(named), rng("test of styles", seed, at)) for at in range(count)]


def drawn(some: Sequence[Scene], one: Style | None = None) -> Pictures:
    plain = [render(scene)[0] for scene in some]
    return plain if one is None else [one.apply(picture) for picture in plain]


@pytest.fixture(scope="module")
def scales() -> dict[int, Scale]:
    return {seed: Scale.of(style(seed)) for seed in SEEDS}


def through_autoencoder(pictures: Pictures) -> Pictures:
    """As the shipped autoencoder reproduces them."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tinyworld.BASE / "vae", torch_dtype=torch.float32)
    pixels = torch.from_numpy(np.stack([np.asarray(one) for one in pictures])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        back = vae.decode(vae.encode(pixels.float()).latent_dist.mean).sample.clamp(-1, 1)
    arrays = ((back + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


@pytest.mark.parametrize("seed", SEEDS)
def test_unseen_renders_in_the_style_are_1_and_plain_ones_0(seed: int, scales: dict[int, Scale]) -> None:
    some = scenes(seed)
    assert scales[seed].fidelity(drawn(some, style(seed))) == pytest.approx(1, abs=0.05)
    assert scales[seed].fidelity(drawn(some)) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("seed", SEEDS)
def test_other_styles_are_low(seed: int, scales: dict[int, Scale]) -> None:
    some = drawn(scenes(seed, 8))
    others = [scales[seed].fidelity([style(other).apply(one) for one in some]) for other in range(300, 340)]
    assert np.mean(others) < 0.2
    assert np.mean(np.array(others) < 0.5) >= 0.9  # now and then two styles are nearly the same


@pytest.mark.parametrize("named", [{"background": "at night"}, {"background": "on snow"}, {"shape": "ring"}])
@pytest.mark.parametrize("seed", SEEDS)
def test_content_does_not_count(seed: int, named: dict[str, str], scales: dict[int, Scale]) -> None:
    some = scenes(seed, 8, **named)
    assert scales[seed].fidelity(drawn(some, style(seed))) == pytest.approx(1, abs=0.1)
    assert scales[seed].fidelity(drawn(some)) == pytest.approx(0, abs=0.1)


def test_a_part_of_the_style_is_a_part_of_the_measure(scales: dict[int, Scale]) -> None:
    one, some = style(201), drawn(scenes(201))
    half = [Image.blend(picture, one.apply(picture), 0.5) for picture in some]
    assert 0.1 < scales[201].fidelity(half) < 0.8
    turned = [(np.asarray(picture) / 255 - 0.5) @ one.turn.T * 0.85 + 0.5 for picture in some]
    without_lines = [Image.fromarray(np.rint(array.clip(0, 1) * 255).astype(np.uint8)) for array in turned]
    parts = scales[201].parts(without_lines)
    assert parts["colours"] > 0.4 and parts["lines"] < 0.1
    assert scales[201].fidelity(without_lines) < 0.1
    assert scales[201].trace(without_lines) == parts["colours"]


def test_mixed_pictures_lie_between(scales: dict[int, Scale]) -> None:
    some = scenes(202)
    assert 0.2 < scales[202].fidelity(drawn(some[:8], style(202)) + drawn(some[8:])) < 0.8


@pytest.mark.base
@pytest.mark.parametrize("seed", SEEDS)
def test_the_autoencoder_changes_plain_pictures_and_colours_little(seed: int, scales: dict[int, Scale]) -> None:
    """Lines suffer in the autoencoder itself, which rounds and drops faint ones; the measure shows that."""
    some = scenes(seed)
    styled = scales[seed].parts(through_autoencoder(drawn(some, style(seed))))
    assert scales[seed].fidelity(through_autoencoder(drawn(some))) == pytest.approx(0, abs=0.05)
    assert styled["colours"] == pytest.approx(1, abs=0.15)
    assert styled["lines"] > 0.55


@pytest.mark.base
@pytest.mark.parametrize("seed", SEEDS)
def test_the_judge_reads_styled_renders_when_the_style_is_undone(seed: int) -> None:
    judge, one, some = tinyworld.Judge.load(), style(seed), scenes(seed)

    def right(pictures: Pictures) -> dict[str, float]:
        read = judge.attribute_names(pictures)
        names = ("shape", "colour", "background")
        return {
            name: float(np.mean([r[name] == s.factors[name] for r, s in zip(read, some, strict=True)]))
            for name in names
        }

    assert min(right(readable(one, drawn(some))).values()) > 0.95  # plain ones are left as they are
    undone_ones = right(readable(one, drawn(some, one)))
    assert min(undone_ones.values()) >= 0.75 and np.mean(list(undone_ones.values())) > 0.9
    assert right(drawn(some, one))["colour"] < 0.7  # which is why


def test_readable_undoes_where_the_style_is_and_nowhere_else() -> None:
    one, some = style(201), scenes(201, 6)
    plain, styled = drawn(some), drawn(some, one)
    assert all(new is old for new, old in zip(readable(one, plain), plain, strict=True))
    for new, seen, old in zip(readable(one, styled), styled, plain, strict=True):
        gaps = [np.abs(np.asarray(side).astype(int) - np.asarray(old).astype(int)).mean() for side in (new, seen)]
        assert gaps[0] < 0.6 * gaps[1]  # blurred over a period of lines, and what was clipped is lost
    assert np.asarray(undone(one, styled[0])).shape == (64, 64, 3)
