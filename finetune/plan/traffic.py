"""How many bytes processes send in a step, as closed forms of what the engines of ``finetune.engines`` do.

tests/benchmarks/test_scaling_figures.py holds them to what processes really send.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.plan.launches import Launch
from finetune.plan.weights import ALIGNED, FLOAT, Weight, by_size, bytes_of, grouped, padded, row, trains, whole


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of the tensors that are summed, collected or summed and dealt out in one optimizer step, each whole."""

    all_reduce: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0

    def sent(self, world: int) -> int:
        """Bytes that one process sends, around a ring: an all-reduce is a reduce-scatter and an all-gather."""
        return round((2 * self.all_reduce + self.all_gather + self.reduce_scatter) * (world - 1) / world)


@dataclass(frozen=True)
class Passes:
    """Through the networks in a micro-step, and micro-steps in a step.

    Blocks that checkpointing computes again are still there: their backward pass has gathered them.
    """

    forward: int = 1
    backward: int = 1
    accumulation: int = 1


def traffic(weights: Sequence[Weight], launch: Launch, world: int, passes: Passes = Passes()) -> Traffic:
    """What is sent in a step."""
    trained, rounds = bytes_of(weights, trains), passes.accumulation
    if world == 1:
        return Traffic()
    match launch.kind:
        case "zero1" | "zero2":  # DeepSpeed sums whole buckets also where each process keeps its piece alone
            line = FLOAT * sum(padded(sum(sizes), ALIGNED * world) for sizes in grouped(weights).values())
            return Traffic(all_reduce=trained * (rounds if launch.kind == "zero2" else 1), all_gather=line)
        case "zero3":
            small, large = by_size(weights, launch)
            turned = sum(padded(one.numbers, world) for one in weights if one.group is not None)
            gathered = whole(small, world) + rounds * round(whole(large, world) * _gathers(large, launch, passes))
            return Traffic(all_gather=gathered, reduce_scatter=FLOAT * turned * rounds)
        case "fsdp2":
            dealt = [one for one in weights if one.dealt and one.shape]
            blocks = sum(row(one, world) * world * one.itemsize for one in dealt if one.unit is not None)
            rest = sum(row(one, world) * world * one.itemsize for one in dealt if one.unit is None)
            turns = passes.forward + passes.backward if launch.reshard else 1
            turned = sum(row(one, world) * world for one in dealt if one.group is not None)
            return Traffic(all_gather=rounds * (turns * blocks + rest), reduce_scatter=rounds * FLOAT * turned)
    return Traffic(all_reduce=trained)


def _gathers(large: Sequence[Weight], launch: Launch, passes: Passes) -> float:
    """How often ZeRO-3 gathers what it does not keep, in a micro-step.

    Once for every pass, but what the next pass comes back to soon stays: the end of a network, at the turn from
    forward to backward; all of it, where a whole network is less than the distance.
    """
    numbers = sum(one.numbers for one in large)
    if not numbers:
        return 0.0
    turn = min(1.0, launch.reuse / (2 * numbers)) if passes.backward else 0.0
    again = passes.forward - 1 + max(0, passes.backward - 1)
    return passes.forward + passes.backward - turn - (again if numbers < launch.reuse else 0)
