from __future__ import annotations

import pytest
import torch
from torch import nn

from finetune.config.schema import EmaConfig
from finetune.errors import UserError
from finetune.train.ema import Ema

VALUES = [1.0, 4.0, -2.0, 0.5, 8.0]


def moved(config: EmaConfig) -> tuple[Ema, nn.Parameter]:
    parameter = nn.Parameter(torch.tensor([3.0]))
    ema = Ema(config, {"p": parameter})
    for step, value in enumerate(VALUES, start=1):
        parameter.data.fill_(value)
        ema.update(step)
    return ema, parameter


def test_five_steps_in_closed_form() -> None:
    ema, _ = moved(EmaConfig(decay=0.9, warmup=False))
    expected = 0.9**5 * 3.0 + sum(0.1 * 0.9 ** (4 - step) * value for step, value in enumerate(VALUES))
    assert ema.state()["p"].item() == pytest.approx(expected, rel=1e-6)


def test_five_steps_with_warm_up() -> None:
    ema, _ = moved(EmaConfig(decay=0.3))
    expected = 3.0
    for step, value in enumerate(VALUES, start=1):
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert ema.state()["p"].item() == pytest.approx(expected, rel=1e-6)


def test_swapping_holds_the_average_and_gives_back_every_bit() -> None:
    ema, parameter = moved(EmaConfig(decay=0.9))
    parameter.data.fill_(0.1)
    before = parameter.data_ptr()
    with ema.swapped():
        assert torch.equal(parameter.data, ema.state()["p"])
        parameter.data.add_(1)  # what happens inside must not reach the average
    assert parameter.data_ptr() == before
    assert parameter.item() == torch.tensor(0.1).item()
    assert ema.state()["p"].item() != parameter.item()


def test_what_is_swapped_comes_back_after_an_error() -> None:
    ema, parameter = moved(EmaConfig(decay=0.9))
    with pytest.raises(RuntimeError), ema.swapped():
        raise RuntimeError
    assert parameter.item() == VALUES[-1]


def test_the_average_is_float32_whatever_the_weights_are() -> None:
    ema = Ema(EmaConfig(decay=0.9), {"p": nn.Parameter(torch.ones(2, dtype=torch.bfloat16))})
    assert ema.state()["p"].dtype == torch.float32


def test_a_state_of_other_parameters_is_refused() -> None:
    ema, _ = moved(EmaConfig(decay=0.9))
    with pytest.raises(UserError, match="other parameters"):
        ema.load({"q": torch.zeros(1)})
