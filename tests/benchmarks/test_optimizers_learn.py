"""Every optimizer learns a style of the embedded world in a hundred steps. Takes minutes; ``-s`` shows the table.

Noise and timesteps are named by the draw, so losses of two runs may be compared step by step.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest

from finetune.config import read_recipe
from finetune.errors import GuardError
from recipes import lora

RECIPE = Path("recipes/configs/lora-tiny.yaml")
STEPS = 100
RATES = {  # near those of the papers, for a rank of 16; none was tuned
    "adamw": 2e-3,
    "sgd": 0.5,
    "lion": 4e-4,
    "adafactor": 2e-3,
    "came": 4e-4,
    "prodigy": 1.0,
    "schedulefree": 4e-3,
    "muon": 2e-3,
    "torch.optim.RAdam": 2e-3,
}


def metrics(output: Path, name: str, rate: float) -> list[dict[str, float]]:
    schedule = f"train.schedule={{name: constant, warmup_steps: {0 if name == 'prodigy' else 10}}}"
    train = (f"train.steps={STEPS}", f"train.optimizer.name={name}", f"train.learning_rate={rate}", schedule)
    cache = output.parent / "cache"
    lora.main(read_recipe(RECIPE, [f"output={output}", f"data.cache.folder={cache}", "report.enabled=false", *train]))
    return read(output)


def read(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    output = tmp_path_factory.mktemp("untrained") / "run"
    with suppress(GuardError):  # the export says that nothing was learnt
        metrics(output, "sgd", 1e-12)
    return [row["loss"] for row in read(output)]


@pytest.mark.slow
@pytest.mark.base
@pytest.mark.parametrize("name", RATES)
def test_the_loss_of_the_last_steps_is_far_below_the_untrained_models(
    name: str, untrained: list[float], tmp_path: Path
) -> None:
    rows = metrics(tmp_path / "run", name, RATES[name])
    left = sum(row["loss"] for row in rows[-30:]) / sum(untrained[-30:])
    print(f"\n| `{name}` | {RATES[name]:g} | {rows[-1]['learning_rate_denoiser']:.2g} | {left:.2f} |")
    assert left < 0.6
