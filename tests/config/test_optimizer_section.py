"""Optimizers and schedules in a recipe: keys of their own, and what cannot be meant together."""

from __future__ import annotations

from pathlib import Path

import pytest
from written_recipes import GOOD, problems, written

from finetune.config import lock, read_recipe
from finetune.config.optimizer import AdamWConfig, ClassConfig, LionConfig, ProdigyConfig
from finetune.config.reference import json_schema, markdown

NAMES = "adamw, adamw8bit, sgd, lion, lion8bit, adafactor, came, prodigy, schedulefree, muon, module.Class"
PLAIN = GOOD.replace("  learning_rate: 1e-3\n", "")


@pytest.mark.parametrize(
    "name",
    [*NAMES.split(", ")[:-1], "torch.optim.RAdam"],
)
def test_what_is_read_is_written_and_read_again(tmp_path: Path, name: str) -> None:
    recipe = read_recipe(written(tmp_path, PLAIN), [f"train.optimizer.name={name}"])
    assert recipe.train.optimizer.name == name
    assert read_recipe(written(tmp_path, lock(recipe), "lock.yaml")) == recipe


def test_without_a_name_it_is_adamw(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, GOOD), ["train.optimizer.weight_decay=0.5"])
    assert recipe.train.optimizer == AdamWConfig(weight_decay=0.5)


def test_options_of_a_class_are_plain_values(tmp_path: Path) -> None:
    section = "train.optimizer={name: torch.optim.RAdam, options: {betas: [0.9, 0.99], eps: 1e-6, foreach: true, n: 3}}"
    found = read_recipe(written(tmp_path, GOOD), [section]).train.optimizer
    assert isinstance(found, ClassConfig)
    assert found.options == {"betas": [0.9, 0.99], "eps": 1e-6, "foreach": True, "n": 3}
    assert type(found.options["n"]) is int


def test_the_rate_of_prodigy_is_1_unless_it_is_said(tmp_path: Path) -> None:
    path = written(tmp_path, PLAIN)
    assert read_recipe(path, ["train.optimizer.name=prodigy"]).train.learning_rate == 1.0
    assert read_recipe(path, ["train.optimizer.name=prodigy", "train.learning_rate=0.5"]).train.learning_rate == 0.5
    assert read_recipe(path, ["train.optimizer.name=lion"]).train.learning_rate == 1e-4


def test_another_optimizer_replaces_the_keys_of_the_one_before(tmp_path: Path) -> None:
    written(tmp_path, GOOD + "  optimizer: {name: adamw, betas: [0.8, 0.9], eps: 1e-6}\n", "base.yaml")
    path = written(tmp_path, "extends: base.yaml\ntrain: {optimizer: {name: lion}}\n")
    assert read_recipe(path).train.optimizer == LionConfig(name="lion")
    same = written(tmp_path, "extends: base.yaml\ntrain: {optimizer: {name: adamw, eps: 1e-7}}\n", "same.yaml")
    assert read_recipe(same).train.optimizer == AdamWConfig(betas=(0.8, 0.9), eps=1e-7)
    unnamed = read_recipe(written(tmp_path, PLAIN), ["train.optimizer.d0=1e-5", "train.optimizer.name=prodigy"])
    assert unnamed.train.optimizer == ProdigyConfig(name="prodigy", d0=1e-5)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("{name: lionn}", f"train.optimizer.name must be one of {NAMES}, not 'lionn'; did you mean 'lion'?"),
        ("{name: torch..RAdam}", f"train.optimizer.name must be one of {NAMES}, not 'torch..RAdam'"),
        ("{name: 3}", f"train.optimizer.name must be one of {NAMES}, not 3"),
        ("lion", f"train.optimizer must be a section with `name` ({NAMES}), not 'lion'"),
        ("{momentum: 0.9}", "momentum is not a key of name 'adamw'; `momentum` belongs to name 'sgd' or name 'muon'"),
        ("{momentum: 0.9}", "; 'adamw' has betas, eps, kernel, weight_decay"),
        ("{name: lion, eps: 1e-8}", "eps is not a key of name 'lion'; `eps` belongs to name 'adamw' or"),
        ("{name: sgd, momentun: 0.5}", "train.optimizer.momentun is not a key; did you mean 'momentum'?"),
        ("{name: came, betas: [0.9, 0.99]}", "betas must be a list of 3, each a number from 0 to below 1"),
        ("{name: schedulefree, betas: [0.0, 0.99]}", "train.optimizer.betas must be a list of 2"),
        ("{name: a.B, options: {x: {}}}", "options.x must be true or false or an integer or a number or text or"),
        ("{name: a.B, options: {lr: 1.0}}", "options.lr must not be set: train.learning_rate says it"),
        ("{name: a.B, optoins: {}}", "train.optimizer.optoins is not a key; did you mean 'options'?"),
    ],
)
def test_each_mistake_in_the_section_has_its_sentence(tmp_path: Path, section: str, said: str) -> None:
    (found,) = problems(written(tmp_path, GOOD + f"  optimizer: {section}\n"))
    assert found.startswith("recipe.yaml:17: ")
    assert said in found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["train.optimizer.name=prodigy"], "train.learning_rate must be near 1 with prodigy, whose own estimate"),
        (["train.schedule.rates='1e-4'"], "train.schedule.rates must be near 1 with prodigy"),
        (
            ["train.learning_rate=1", "adapter.text_encoder=true", "adapter.text_encoder_learning_rate=1e-5"],
            "adapter.text_encoder_learning_rate must be near 1 with prodigy",
        ),
        (["train.learning_rate=1", "adapter.lora_plus_ratio=16"], "adapter.lora_plus_ratio is set with prodigy"),
    ],
)
def test_rates_of_another_optimizer_are_not_for_prodigy(tmp_path: Path, changes: list[str], said: str) -> None:
    (found,) = problems(written(tmp_path, GOOD), "train.optimizer={name: prodigy}", *changes)
    assert said in found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.schedule.name=cosine", "train.schedule.name must be constant with schedulefree"),
        ("train.schedule.rates=1e-3:10, 1e-4:20", "train.schedule.rates must be one rate with schedulefree"),
        ("train.ema={decay: 0.9}", "train.ema is set with schedulefree, which exports an average of its own"),
        ("adapter.max_norm=1.0", "adapter.max_norm is set with schedulefree"),
    ],
)
def test_schedule_free_averages_once_and_alone(tmp_path: Path, change: str, said: str) -> None:
    (found,) = problems(written(tmp_path, GOOD), "train.optimizer={name: schedulefree}", change)
    assert said in found
    read_recipe(written(tmp_path, GOOD), ["train.optimizer={name: schedulefree}", "train.schedule.warmup_steps=5"])


def test_8_bits_are_not_for_the_cpu(tmp_path: Path) -> None:
    (found,) = problems(written(tmp_path, GOOD), "train.device=cpu", "train.optimizer.name=adamw8bit")
    assert "train.optimizer.name is adamw8bit, which needs a CUDA GPU" in found


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("{name: linear, power: 2.0}", "schedule.power is set, but the schedule is 'linear'; it belongs to polynomial"),
        ("{name: cosine, cycles: 3}", "schedule.cycles is set, but the schedule is 'cosine'"),
        ("{name: cosine, decay: linear}", "schedule.decay is set, but the schedule is 'cosine'"),
        ("{final: 0.1}", "schedule.final is set, but the schedule is 'constant'"),
        (
            "{name: warmup_stable_decay, warmup_steps: 10, decay_steps: 11}",
            "decay_steps comes to 11 steps, which with 10 of warm-up are more than the run's 20",
        ),
        ("{name: warmup_stable_decay, warmup_steps: 10, decay_share: 0.6}", "decay_share comes to 12 steps"),
        ("{name: warmup_stable_decay, decay_steps: 5, decay_share: 0.5}", "decay_share is set beside decay_steps"),
        ("{rates: fast}", "schedule.rates must be 'rate:step' pairs"),
    ],
)
def test_keys_of_another_schedule_and_falls_that_do_not_fit(tmp_path: Path, schedule: str, said: str) -> None:
    (found,) = problems(written(tmp_path, GOOD + f"  schedule: {schedule}\n"))
    assert said in found


def test_rates_that_are_none_are_said_once_whatever_the_optimizer(tmp_path: Path) -> None:
    changes = ["train.optimizer={name: schedulefree}", "train.schedule.rates=fast"]
    assert len(problems(written(tmp_path, GOOD), *changes)) == 1


def test_the_reference_has_a_table_for_each_optimizer() -> None:
    text = markdown()
    for name in NAMES.split(", "):
        assert f"## `train.optimizer`, name `{name}`" in text
    assert "name `adamw`" in next(line for line in text.splitlines() if line.startswith("| `optimizer`"))
    assert '"ProdigyConfig"' in json_schema()
