"""The learning rate as a pure function of the optimizer step: nothing to save, nothing that counts processes."""

from __future__ import annotations

import math

from finetune.config.rates import rate_at
from finetune.config.schedule import ScheduleConfig


def rate(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The share of the highest learning rate that the update number ``step`` uses.

    Warm-up rises linearly and reaches 1 with its last update, so that the first update already moves something. The
    rest falls from 1 towards ``schedule.final``.

    Args:
        step: updates done before this one, 0 to ``steps`` - 1.
        steps: updates of the whole run.
    """
    if pairs := schedule.pairs:
        return rate_at(pairs, step) / max(pair.rate for pair in pairs)
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return 1.0
    begin = schedule.warmup_steps
    if schedule.name == "warmup_stable_decay":
        begin = max(begin, steps - schedule.falling_steps(steps))
    progress = min(1.0, max(0.0, (step - begin) / max(1, steps - begin)))
    return schedule.final + (1.0 - schedule.final) * _shape(schedule, progress)


def _shape(schedule: ScheduleConfig, progress: float) -> float:
    """From 1 at ``progress`` 0 to 0 at 1."""
    match schedule.decay if schedule.name == "warmup_stable_decay" else schedule.name:
        case "linear":
            return 1.0 - progress
        case "polynomial":
            return (1.0 - progress) ** schedule.power
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "cosine_with_restarts":
            within = schedule.cycles * progress % 1.0 if progress < 1.0 else 1.0
            return 0.5 * (1.0 + math.cos(math.pi * within))
        case "rex":  # Chen et al. 2022
            return (1.0 - progress) / (1.0 - 0.5 * progress)
        case "1-sqrt":  # Hägele et al. 2024
            return 1.0 - math.sqrt(progress)
    raise ValueError(f"no schedule {schedule.name!r}")
