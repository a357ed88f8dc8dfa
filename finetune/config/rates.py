"""Learning rates step by step, in A1111's notation: ``5e-6:12000, 1e-7:30000``."""

from __future__ import annotations

import math
from typing import NamedTuple

from finetune.errors import UserError


class Pair(NamedTuple):
    """A learning rate for the steps below ``until`` that no earlier pair has; None: to the end of the run."""

    rate: float
    until: int | None


def parse(text: str) -> tuple[Pair, ...]:
    """The pairs of ``rate[:step]``, which commas part. One without step, or with step -1, is the last that is read.

    Raises:
        UserError: ``text`` is something else.
    """
    pairs: list[Pair] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        pairs.append(_pair(part, text))
        if pairs[-1].until is None:
            break
    if not pairs:
        raise UserError(f"must hold pairs such as '5e-6:12000, 1e-7:30000', not {text!r}")
    return tuple(pairs)


def rate_at(pairs: tuple[Pair, ...], step: int) -> float:
    """The learning rate of the update after ``step`` others; the last there is beyond the end."""
    return next((pair.rate for pair in pairs if pair.until is None or step < pair.until), pairs[-1].rate)


def last_step(pairs: tuple[Pair, ...]) -> int | None:
    """How many updates the pairs are for; None: any number."""
    ends = [pair.until for pair in pairs if pair.until is not None]
    return max(ends) if ends and len(ends) == len(pairs) else None


def _pair(part: str, text: str) -> Pair:
    rate, _, step = part.partition(":")
    try:
        pair = Pair(float(rate), int(step) if ":" in part else -1)
    except ValueError:
        raise UserError(f"must be 'rate:step' pairs such as '5e-6:12000, 1e-7:30000'; {part!r} is none") from None
    if not (math.isfinite(pair.rate) and pair.rate > 0):
        raise UserError(f"must hold positive learning rates, not {rate.strip()!r}")
    if pair.until == -1:
        return pair._replace(until=None)
    if pair.until is not None and pair.until < 1:
        raise UserError(f"must hold positive steps, or -1 for the end of the run, not {step.strip()!r} in {text!r}")
    return pair
