from __future__ import annotations

import math

import pytest

from finetune.config.schema import ScheduleConfig
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


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_final_is_where_it_ends(name: str) -> None:
    schedule = ScheduleConfig.model_validate({"name": name, "final": 0.1})
    assert rate(schedule, STEPS, STEPS) == pytest.approx(0.1)
    assert min(rates(name=name, final=0.1)) >= 0.1


def test_warm_up_longer_than_the_run_is_all_there_is() -> None:
    assert rates(warmup_steps=1000)[-1] == pytest.approx(0.1)
