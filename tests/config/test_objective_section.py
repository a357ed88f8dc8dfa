"""Objectives that cannot be meant are refused by their key, before any model is looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
from written_recipes import GOOD, problems, written

from finetune.config import lock, read_recipe
from finetune.config.objective import ObjectiveConfig

FULL_OF_IT = """\
objective:
  prediction: v_prediction
  zero_terminal_snr: true
  timesteps: {distribution: {kind: logit_normal, mean: 0.5}, min: 0.1, max: 900, bias: 1, draws: stratified}
  noise: {offset: 0.1, offset_probability: 0.5, perturbation: 0.1, pyramid: {discount: 0.5}}
  weighting: {kind: min_snr, gamma: 4, least: 0.01}
  loss: {kind: pseudo_huber, delta: 0.2, schedule: snr}
"""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            ["objective.zero_terminal_snr=true", "objective.prediction=epsilon"],
            "objective.prediction must be v_prediction or sample with zero_terminal_snr",
        ),
        (["objective.zero_terminal_snr=true", "prior={kind: model}"], "prior.kind must be images or none"),
        (
            ["objective.zero_terminal_snr=true", "adapter={kind: hypernetwork}"],
            "objective.zero_terminal_snr needs an adapter that changes layers (lora, lokr",
        ),
        (["objective.timesteps={min: 0.5, max: 0.5}"], "objective.timesteps.min must be less than max, which is 0.5"),
        (["objective.timesteps={min: 600, max: 500}"], "objective.timesteps.min must be less than max, which is 500"),
        (["objective.timesteps.min=1.5"], "objective.timesteps.min must be a number from 0 to 1 or an integer of at"),
        (["objective.noise.offset_probability=0.5"], "objective.noise.offset_probability is set, but offset is 0"),
        (
            ["objective.timesteps.shift={kind: static}", "objective.weighting={kind: min_snr}"],
            "objective.weighting.kind 'min_snr' is for discrete-time diffusion, but timesteps.shift is for flow",
        ),
        (
            ["objective.weighting={kind: cosmap}", "objective.loss={kind: huber, schedule: snr}"],
            "objective.loss.schedule 'snr' is for discrete-time diffusion, but weighting cosmap is for flow matching",
        ),
        (["objective.weighting={kind: min_snr, k: 1}"], "objective.weighting.k is not a key of kind 'min_snr'"),
        (["objective.weighting={kind: minsnr}"], "objective.weighting.kind must be one of none, min_snr"),
    ],
)
def test_contradictions(tmp_path: Path, change: list[str], reason: str) -> None:
    found = problems(written(tmp_path, GOOD), *change)
    assert any(reason in problem for problem in found), found


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("min_snr_gamma", "objective.weighting: {kind: min_snr, gamma: 5}"),
        ("snr_gamma", "objective.weighting: {kind: min_snr, gamma: 5}"),
        ("noise_offset", "objective.noise.offset"),
        ("ip_noise_gamma", "objective.noise.perturbation"),
        ("multires_noise_discount", "objective.noise.pyramid.discount"),
        ("min_timestep", "objective.timesteps.min"),
        ("loss_type", "objective.loss.kind"),
        ("huber_c", "objective.loss.delta"),
    ],
)
def test_keys_of_other_trainers_are_named(tmp_path: Path, key: str, place: str) -> None:
    [problem] = problems(written(tmp_path, f"{GOOD}  {key}: 5\n"))
    assert problem.endswith(f"train.{key} is not a key; did you mean {place!r}?")


def test_a_full_section_is_read_and_written(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, GOOD + FULL_OF_IT))
    assert recipe.objective.timesteps.max == 900
    assert read_recipe(written(tmp_path, lock(recipe), "lock.yaml")) == recipe


def test_a_recipe_without_it_has_the_defaults(tmp_path: Path) -> None:
    assert read_recipe(written(tmp_path, GOOD)).objective == ObjectiveConfig()


@pytest.mark.parametrize(
    "change", ["objective.noise.offset=0.1", "data.concepts.0.timestep_bias=1", "objective.zero_terminal_snr=true"]
)
def test_an_aesthetic_embedding_has_no_objective(change: str) -> None:
    [problem] = problems(Path("recipes/configs/aesthetic-tiny.yaml"), change)
    assert "has no part in an aesthetic embedding" in problem
