"""How many bytes of weights, gradients and optimizer a process holds, as closed forms.

They are of what the engines of ``finetune.engines`` do, which is not all that the papers have: trained weights are
float32 here, and DeepSpeed keeps a second copy of them in float32 and buffers of fixed size. tests/benchmarks/
test_scaling_figures.py holds them to what processes really hold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from finetune.plan.launches import Launch
from finetune.plan.weights import (
    ALIGNED,
    FLOAT,
    Weight,
    by_size,
    bytes_of,
    frozen,
    grouped,
    padded,
    piece,
    row,
    trains,
    whole,
)


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes that the process holds which holds the most.

    Attributes:
        frozen, trained: weights.
        copies: of trained weights, to which the optimizer is applied.
        gradients: the most that are kept from one backward pass to the next, or to the step.
        optimizer: what it remembers.
        buffers: in which gradients are sent.
        gathered: the most of dealt weights that are whole at a time, beside their pieces.
        host: of these parts, what lies in the host's memory.
    """

    frozen: int = 0
    trained: int = 0
    copies: int = 0
    gradients: int = 0
    optimizer: int = 0
    buffers: int = 0
    gathered: int = 0
    host: dict[str, int] = field(default_factory=dict)

    @property
    def device(self) -> int:
        """All of it on the device."""
        parts = (self.frozen, self.trained, self.copies, self.gradients, self.optimizer, self.buffers, self.gathered)
        return sum(parts)

    @property
    def on_host(self) -> int:
        """All of it on the host, of one process."""
        return sum(self.host.values())

    def all(self, part: str) -> int:
        """Bytes of a part, wherever they lie."""
        return int(getattr(self, part)) + self.host.get(part, 0)


def held(weights: Sequence[Weight], launch: Launch, world: int, states: int, accumulation: int = 1) -> Held:
    """What a process holds under ``launch`` on ``world`` processes.

    Args:
        states: bytes that the optimizer remembers of all that trains. Where it is dealt out it is of an optimizer that
            treats every number alike.
    """
    match launch.kind:
        case "zero1" | "zero2":
            return _lines(weights, launch, world, states, accumulation)
        case "zero3":
            return _pieces(weights, launch, world, states)
        case "fsdp2":
            return _rows(weights, launch, world, states)
    trained = bytes_of(weights, trains)  # DDP's buckets are the gradients themselves
    return Held(frozen=bytes_of(weights, frozen), trained=trained, gradients=trained, optimizer=states)


def _lines(weights: Sequence[Weight], launch: Launch, world: int, states: int, accumulation: int) -> Held:
    """ZeRO-1 and 2: a group's weights lie end to end, and a process has a stretch of that line.

    Tensors are cut where the stretch ends, but not their gradients before the step: a process has those whole that
    reach into its stretch. ZeRO-1 sends gradients where an accumulation ends, and keeps all of them until then.
    """
    lines = grouped(weights)
    total = sum(map(sum, lines.values()))
    stretches = [padded(sum(sizes), ALIGNED * world) // world for sizes in lines.values()]
    stretch = FLOAT * sum(stretches)
    reach = [
        sum(_reaching(sizes, size, rank) for sizes, size in zip(lines.values(), stretches, strict=True))
        for rank in range(world)
    ]
    whole = Held(
        frozen=bytes_of(weights, frozen),
        trained=stretch * world,
        copies=stretch,
        gradients=FLOAT * max(reach, default=0),
        optimizer=states * stretch // (FLOAT * total) if total else 0,
        buffers=FLOAT * launch.bucket * launch.buffers,
    )
    if launch.offload_optimizer:
        largest = FLOAT * max(map(max, lines.values()), default=0)
        moved = {"copies": stretch, "gradients": stretch, "optimizer": whole.optimizer, "buffers": stretch + largest}
        return replace(whole, copies=0, gradients=0, optimizer=0, buffers=whole.buffers + largest, host=moved)
    if launch.kind == "zero1" and accumulation > 1:
        return replace(whole, gradients=max(whole.gradients, FLOAT * total))
    return whole


def _pieces(weights: Sequence[Weight], launch: Launch, world: int, states: int) -> Held:
    """ZeRO-3: of every tensor each process has a piece, and small ones it also has whole."""
    small, large = by_size(weights, launch)
    total = sum(one.numbers for one in weights if trains(one))
    stretch = FLOAT * sum(piece(one, world) for one in weights if trains(one))

    def cut(kind: Callable[[Weight], bool]) -> int:
        return sum(piece(one, world) * one.itemsize for one in weights if kind(one) and one.dealt)

    def kept(kind: Callable[[Weight], bool]) -> int:
        beside = sum(one.numbers * one.itemsize for one in weights if kind(one) and not one.dealt)
        return beside + bytes_of(small, kind)

    numbers = sum(one.numbers for one in large)
    share = min(1.0, (launch.reuse // 2 + launch.prefetch) / numbers) if numbers else 0.0
    optimizer = states * stretch // (FLOAT * total) if total else 0
    parts = {
        "frozen": cut(frozen),
        "trained": cut(trains),
        "copies": stretch,
        "gradients": stretch,
        "optimizer": optimizer,
    }
    host: dict[str, int] = {}
    if launch.offload_optimizer:
        moved = ("copies", "gradients", "optimizer", *(("frozen", "trained") if launch.offload_weights else ()))
        host = {name: parts.pop(name) for name in moved}
        host["gradients"] *= 2  # those that come, and those that the optimizer reads
    return Held(
        frozen=parts.pop("frozen", 0) + kept(frozen),
        trained=parts.pop("trained", 0) + kept(trains),
        **parts,
        buffers=FLOAT * launch.bucket,
        gathered=round(whole(large, 1) * share),
        host=host,
    )


def _rows(weights: Sequence[Weight], launch: Launch, world: int, states: int) -> Held:
    """FSDP2: tensors are cut along their first axis. The optimizer moves the pieces themselves."""
    dealt = [one for one in weights if one.dealt and one.shape]
    total = sum(one.numbers for one in weights if trains(one))
    pieces = {
        kind.__name__: sum(row(one, world) * one.itemsize for one in dealt if kind(one)) for kind in (frozen, trains)
    }
    beside = sum(one.numbers * one.itemsize for one in weights if not (one.dealt and one.shape))
    units: dict[str | None, int] = defaultdict(int)
    for one in dealt:
        units[one.unit] += one.numbers * (one.itemsize + (FLOAT if trains(one) else 0))  # with its gradient
    rest = units.pop(None, 0)
    open_units = sorted(units.values())[-2:] if launch.reshard else units.values()  # one computes, another comes
    optimizer = states * pieces["trains"] // (FLOAT * total) if total else 0
    found = Held(
        frozen=pieces["frozen"] + beside,
        trained=pieces["trains"],
        gradients=pieces["trains"],
        optimizer=optimizer,
        gathered=rest + sum(open_units),
    )
    if launch.offload_weights:
        host = {"frozen": pieces["frozen"], "trained": found.trained, "gradients": found.gradients}
        return replace(found, frozen=beside, trained=0, gradients=0, optimizer=0, host={**host, "optimizer": optimizer})
    return found


def _reaching(sizes: Sequence[int], stretch: int, rank: int) -> int:
    """Numbers of tensors that reach into a process's stretch, with what the last one has of padding."""
    start, end, place, found = rank * stretch, (rank + 1) * stretch, 0, 0
    for size in sizes:
        if place < end and place + size > start:
            found += size
        place += size
    return found
