"""Whether a checkpoint is of the run that would go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Size

from finetune.config.schema import TrainConfig
from finetune.errors import UserError
from finetune.train.checkpoint import Snapshot


def samples_per_step(train: TrainConfig, world: int) -> int:
    """Pictures of all processes together that one update sees: the global batch."""
    return train.batch_size * train.gradient_accumulation_steps * world


def require_fitting(
    saved: Snapshot, train: TrainConfig, world: int, shapes: Mapping[str, Size], pictures: Mapping[str, str], run: Path
) -> None:
    """Refuse to go on where the next update would not be the one that the run was to make.

    Args:
        world: processes.
        shapes: of what trains, by name.
        pictures: id -> hash.
        run: its folder, for messages.

    Raises:
        UserError: the run is longer already, its global batch was another, or it trained other weights or pictures.
    """
    if saved.step > train.total_steps:
        raise UserError(f"train.steps is {train.total_steps}, but {run} is already at step {saved.step}")
    then, here = saved.facts["samples_per_step"], samples_per_step(train, world)
    if then != here:
        raise UserError(
            f"{run} was trained with {then} pictures a step, here it would be {here}: processes x train.batch_size x "
            f"train.gradient_accumulation_steps must stay the same. {_advice(then, world, train.batch_size)}"
        )
    if {name: value.shape for name, value in saved.trained.items()} != shapes:
        raise UserError(f"{run} holds a run that trains other weights than this recipe")
    known = saved.facts["pictures"]
    if changed := sorted(i for i in known.keys() | pictures.keys() if known.get(i) != pictures.get(i)):
        raise UserError(
            f"{len(changed)} pictures are not those that {run} was trained on, the first is {changed[0]!r}; put them "
            "back, or choose another output folder"
        )


def _advice(samples: int, world: int, batch_size: int) -> str:
    """What would give ``samples`` on ``world`` processes: passes as large as ``batch_size`` or nearly."""
    if samples % world:
        fitting = [str(number) for number in range(1, samples + 1) if samples % number == 0]
        listed = f"{', '.join(fitting[:-1])} or {fitting[-1]}" if len(fitting) > 1 else fitting[0]
        return f"No values do on {world} processes; take {listed} of them"
    each = samples // world
    size = max(number for number in range(1, min(batch_size, each) + 1) if each % number == 0)
    many = f"{world} processes" if world > 1 else "one process"
    return f"On {many} train.batch_size={size} train.gradient_accumulation_steps={each // size} would do"
