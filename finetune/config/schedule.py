"""What a recipe says of the learning rate over the steps, and what in it cannot be meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from finetune.config.rates import Pair, parse
from finetune.config.section import Fraction, Section, Text
from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.config.schema import Recipe

Found = tuple[tuple[str | int, ...], str]
"""A key, and the rest of a sentence that begins with it."""

AT = ("train", "schedule")
OWNERS = {  # key -> the schedules that use it
    "cycles": ("cosine_with_restarts",),
    "power": ("polynomial",),
    "decay_steps": ("warmup_stable_decay",),
    "decay_share": ("warmup_stable_decay",),
    "decay": ("warmup_stable_decay",),
    "final": ("linear", "cosine", "cosine_with_restarts", "polynomial", "rex", "warmup_stable_decay"),
}


class ScheduleConfig(Section):
    """The learning rate as a function of the optimizer step."""

    name: Literal[
        "constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "rex", "warmup_stable_decay"
    ] = "constant"
    """Its shape after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Steps in which the learning rate rises from 0; at most `train.steps`."""
    cycles: PositiveInt = 1
    """Of `cosine_with_restarts`."""
    power: PositiveFloat = 1.0
    """Of `polynomial`."""
    decay_steps: PositiveInt | None = None
    """Of `warmup_stable_decay`: how many steps it falls in; `decay_share` of the run's where it is not set."""
    decay_share: Fraction = 0.2
    """Of `warmup_stable_decay`: in what share of the run's steps it falls, at its end."""
    decay: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt"
    """Of `warmup_stable_decay`: how it falls; `1-sqrt` is the best of Hägele et al. (2024)."""
    final: Fraction = 0.0
    """Where a falling schedule ends, as a share of the learning rate."""
    rates: Text | None = None
    """The learning rate itself, step by step, as A1111 writes it: `5e-6:12000, 1e-7:30000` is 5e-6 in the first 12000
    steps and 1e-7 up to step 30000, where the run ends if `train.steps` did not end it before. A last rate without a
    step, or with step -1, lasts until `train.steps`. Takes the place of `train.learning_rate`."""

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """What ``rates`` says; empty where it is not set."""
        return parse(self.rates) if self.rates is not None else ()

    def falling_steps(self, steps: int) -> int:
        """In how many of a run's last steps ``warmup_stable_decay`` falls."""
        return self.decay_steps or round(self.decay_share * steps)


def contradictions(recipe: Recipe) -> Iterator[Found]:
    """Everything about the schedule that cannot be meant."""
    train = recipe.train
    schedule, asked = train.schedule, train.schedule.warmup_steps
    if schedule.rates is not None:
        yield from _rates(schedule)
        return
    if asked > train.steps:
        yield (*AT, "warmup_steps"), f"must be at most train.steps, which is {train.steps}, not {asked}"
    for key, owners in OWNERS.items():
        if schedule.name not in owners and getattr(schedule, key) != ScheduleConfig.model_fields[key].default:
            yield (*AT, key), f"is set, but the schedule is {schedule.name!r}; it belongs to {', '.join(owners)}"
    if schedule.name != "warmup_stable_decay":
        return
    falling = schedule.falling_steps(train.steps)
    if schedule.decay_steps is not None and schedule.decay_share != ScheduleConfig().decay_share:
        yield (*AT, "decay_share"), "is set beside decay_steps, which says the same"
    elif asked + falling > train.steps:
        key = "decay_share" if schedule.decay_steps is None else "decay_steps"
        text = f"comes to {falling} steps, which with {asked} of warm-up are more than the run's {train.steps}"
        yield (*AT, key), text


def _rates(schedule: ScheduleConfig) -> Iterator[Found]:
    """What stands beside rates that already say everything."""
    try:
        schedule.pairs  # noqa: B018
    except UserError as error:
        yield (*AT, "rates"), str(error)
    if schedule.name != "constant":
        yield (*AT, "name"), f"must be constant where rates say every step's rate, not {schedule.name!r}"
    if schedule.warmup_steps:
        yield (*AT, "warmup_steps"), "must be 0 where rates say every step's rate"
