from __future__ import annotations

import math

import pytest

from finetune.config.rates import parse
from finetune.config.schedule import ScheduleConfig
from finetune.config.schema import TrainConfig
from finetune.errors import UserError
from finetune.train.schedules import rate

STEPS = 100


def rates(**settings: object) -> list[float]:
    schedule = ScheduleConfig.model_validate(settings)
    return [rate(schedule, step, STEPS) for step in range(STEPS)]


def test_constant_is_one() -> None:
    assert rates() == [1.0] * STEPS


def test_linear_falls_evenly() -> None:
    assert rates(name="linear") == pytest.approx([1 - step / STEPS for step in range(STEPS)])


def test_polynomial_is_a_power_of_linear() -> None:
    assert rates(name="polynomial", power=2.0) == pytest.approx([(1 - step / STEPS) ** 2 for step in range(STEPS)])


def test_cosine() -> None:
    expected = [0.5 * (1 + math.cos(math.pi * step / STEPS)) for step in range(STEPS)]
    assert rates(name="cosine") == pytest.approx(expected)


def test_restarts_repeat_the_cosine() -> None:
    quarter = [0.5 * (1 + math.cos(math.pi * step / 25)) for step in range(25)]
    assert rates(name="cosine_with_restarts", cycles=4) == pytest.approx(quarter * 4)


def test_warm_up_moves_from_the_first_update_and_ends_at_one() -> None:
    found = rates(name="cosine", warmup_steps=10)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10] == 1.0
    assert found[11:] == sorted(found[11:], reverse=True)


def test_rex_falls_slowly_and_then_fast() -> None:
    """Chen et al. 2022: (1 - p) / (1/2 + (1 - p) / 2)."""
    expected = [(1 - step / STEPS) / (0.5 + 0.5 * (1 - step / STEPS)) for step in range(STEPS)]
    assert rates(name="rex") == pytest.approx(expected)


DECAYS = {
    "linear": lambda p: 1 - p,
    "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
    "1-sqrt": lambda p: 1 - math.sqrt(p),
}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [{"decay_steps": 30}, {"decay_share": 0.3}])
def test_warm_up_stable_decay_at_its_joints(decay: str, length: dict[str, float]) -> None:
    found = rates(name="warmup_stable_decay", warmup_steps=10, decay=decay, final=0.1, **length)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[9:71] == [1.0] * 62, "up to and with the step in which it begins to fall"
    assert found[71:] == pytest.approx([0.1 + 0.9 * DECAYS[decay]((step - 70) / 30) for step in range(71, 100)])
    schedule = ScheduleConfig.model_validate({"name": "warmup_stable_decay", "decay": decay, "final": 0.1, **length})
    assert rate(schedule, STEPS, STEPS) == pytest.approx(0.1)


def test_the_stable_part_does_not_depend_on_the_length_of_the_run() -> None:
    schedule = ScheduleConfig(name="warmup_stable_decay", warmup_steps=10, decay_steps=20)
    assert [rate(schedule, step, 100) for step in range(80)] == [rate(schedule, step, 1000) for step in range(80)]


def test_a_fall_of_no_steps_is_no_fall_and_one_of_all_begins_at_once() -> None:
    assert rates(name="warmup_stable_decay", decay_share=0.0) == [1.0] * STEPS
    assert rates(name="warmup_stable_decay", decay_share=1.0, decay="linear") == pytest.approx(rates(name="linear"))


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "rex"])
def test_final_is_where_it_ends(name: str) -> None:
    schedule = ScheduleConfig.model_validate({"name": name, "final": 0.1})
    assert rate(schedule, STEPS, STEPS) == pytest.approx(0.1)
    assert min(rates(name=name, final=0.1)) >= 0.1


def test_warm_up_longer_than_the_run_is_all_there_is() -> None:
    assert rates(warmup_steps=1000)[-1] == pytest.approx(0.1)


def table(text: str, steps: int, begin: int = 0) -> list[tuple[int, float]]:
    """Where a new learning rate begins, in a run that is at step ``begin`` and may take ``steps``; the end has none."""
    train = TrainConfig.model_validate({"steps": steps, "schedule": {"rates": text}})
    total, found = train.total_steps, []
    for step in range(begin, total):
        value = train.peak_learning_rate * rate(train.schedule, step, total)
        if not found or found[-1][1] != pytest.approx(value):
            found.append((step, pytest.approx(value)))
    return [*found, (total, 0.0)]


@pytest.mark.parametrize(
    ("text", "begin", "expected"),
    [
        ("0.01:500, 0.001:1000", 0, [(0, 0.01), (500, 0.001), (1000, 0)]),
        ("0.01:500, 0.001:1000", 499, [(499, 0.01), (500, 0.001), (1000, 0)]),
        ("0.01:500, 0.001:1000", 700, [(700, 0.001), (1000, 0)]),  # resumed: a pair that is over is skipped
        ("5e-6", 0, [(0, 5e-6), (2000, 0)]),
        ("5e-6:-1", 0, [(0, 5e-6), (2000, 0)]),
        ("5e-6:100, 1e-7", 0, [(0, 5e-6), (100, 1e-7), (2000, 0)]),
        ("5e-6:100, 1e-7:-1, 3:4", 0, [(0, 5e-6), (100, 1e-7), (2000, 0)]),  # nothing is read after the end
        ("5e-6:100, 1e-7:9000", 0, [(0, 5e-6), (100, 1e-7), (2000, 0)]),  # clamped to the steps of the run
        (" 5e-6:100 ,, 1e-7 : 300 , ", 0, [(0, 5e-6), (100, 1e-7), (300, 0)]),
        ("1e-7:300, 5e-6:100", 0, [(0, 1e-7), (300, 0)]),  # a pair that ends before it could begin
        ("1e-3:100, 5e-3:200", 0, [(0, 1e-3), (100, 5e-3), (200, 0)]),
    ],
)
def test_rates_step_by_step(text: str, begin: int, expected: list[tuple[int, float]]) -> None:
    """METHODS §4.7: the table of A1111's schedule strings, in runs of at most 2000 steps."""
    assert table(text, 2000, begin) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fast", "'fast' is none"),
        ("1e-4:soon", "'1e-4:soon' is none"),
        ("1e-4:1e3", "'1e-4:1e3' is none"),
        ("1e-4:10:20", "'1e-4:10:20' is none"),
        ("1e-4:", "'1e-4:' is none"),
        (" , ", "must hold pairs"),
        ("0:100", "positive learning rates, not '0'"),
        ("nan:100", "positive learning rates, not 'nan'"),
        ("-1e-4", "positive learning rates, not '-1e-4'"),
        ("1e-4:0", "positive steps"),
        ("1e-4:-2", "positive steps"),
    ],
)
def test_rates_that_are_none_have_one_clear_error(text: str, said: str) -> None:
    """METHODS §4.3."""
    with pytest.raises(UserError) as caught:
        parse(text)
    assert said in str(caught.value) and "\n" not in str(caught.value)
