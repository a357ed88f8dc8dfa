"""How many bytes of weights, gradients and optimizer a process holds, and how many it sends, as closed forms.

They are of what the engines of ``finetune.engines`` do, which is not all that the papers have: trained weights are
float32 here, and DeepSpeed keeps a second copy of them in float32 and buffers of fixed size. tests/distributed/
test_scaling.py holds them to what processes really hold and send.

N processes; P numbers that train; a tensor of n numbers is dealt out as pieces of ceil(n / N).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from finetune.plan.launches import Launch

FLOAT = 4  # bytes; what trains, its gradients and what the optimizer remembers
ALIGNED = 2  # numbers; ZeRO-1 and 2 fill a group's line of weights up to a multiple of this and N


@dataclass(frozen=True)
class Weight:
    """One tensor of a run.

    Attributes:
        itemsize: bytes a number.
        group: of the optimizer; None where it is frozen.
        dealt: whether it is in a network that ZeRO-3 and FSDP2 deal out, which others hold whole.
        unit: the block that FSDP2 gathers it with; None where that is the network as a whole.
    """

    shape: tuple[int, ...]
    itemsize: int = FLOAT
    group: str | None = None
    dealt: bool = True
    unit: str | None = None

    @property
    def numbers(self) -> int:
        """n."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes that the process holds which holds the most.

    Attributes:
        frozen, trained: weights.
        copies: of trained weights, to which the optimizer is applied.
        gradients: between the last backward pass of a step and the step.
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
    """Through the denoiser in a micro-step, and micro-steps in a step."""

    forward: int = 1
    backward: int = 1
    accumulation: int = 1


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
    trained = _bytes(weights, trains)
    return Held(
        frozen=_bytes(weights, frozen),
        trained=trained,
        gradients=trained,
        optimizer=states,
        buffers=trained if world > 1 else 0,  # DDP's buckets
    )


def traffic(weights: Sequence[Weight], launch: Launch, world: int, passes: Passes = Passes()) -> Traffic:
    """What is sent in a step."""
    trained, rounds = _bytes(weights, trains), passes.accumulation
    if world == 1:
        return Traffic()
    match launch.kind:
        case "zero1" | "zero2":  # DeepSpeed sums whole buckets also where each process keeps its piece alone
            line = FLOAT * sum(_padded(sum(sizes), ALIGNED * world) for sizes in _groups(weights).values())
            return Traffic(all_reduce=trained * (rounds if launch.kind == "zero2" else 1), all_gather=line)
        case "zero3":
            small, large = _by_size(weights, launch)
            turned = sum(_padded(one.numbers, world) for one in weights if one.group is not None)
            gathered = _whole(small, world) + rounds * round(_whole(large, world) * _gathers(large, launch, passes))
            return Traffic(all_gather=gathered, reduce_scatter=FLOAT * turned * rounds)
        case "fsdp2":
            dealt = [one for one in weights if one.dealt and one.shape]
            blocks = sum(_row(one, world) * world * one.itemsize for one in dealt if one.unit is not None)
            rest = sum(_row(one, world) * world * one.itemsize for one in dealt if one.unit is None)
            turns = passes.forward + passes.backward if launch.reshard else 1
            turned = sum(_row(one, world) * world for one in dealt if one.group is not None)
            return Traffic(all_gather=rounds * (turns * blocks + rest), reduce_scatter=rounds * FLOAT * turned)
    return Traffic(all_reduce=trained)


def trains(one: Weight) -> bool:
    """Whether the optimizer moves it."""
    return one.group is not None


def frozen(one: Weight) -> bool:
    """Whether nothing moves it."""
    return one.group is None


def _lines(weights: Sequence[Weight], launch: Launch, world: int, states: int, accumulation: int) -> Held:
    """ZeRO-1 and 2: a group's weights lie end to end, and a process has a stretch of that line.

    Tensors are cut where the stretch ends, but not their gradients before the step: a process has those whole that
    reach into its stretch. ZeRO-1 sends gradients where an accumulation ends, and keeps all of them until then.
    """
    groups = _groups(weights)
    total = sum(map(sum, groups.values()))
    stretches = [_padded(sum(sizes), ALIGNED * world) // world for sizes in groups.values()]
    stretch = FLOAT * sum(stretches)
    reach = [
        sum(_reaching(sizes, size, rank) for sizes, size in zip(groups.values(), stretches, strict=True))
        for rank in range(world)
    ]
    whole = Held(
        frozen=_bytes(weights, frozen),
        trained=stretch * world,
        copies=stretch,
        gradients=FLOAT * max(reach, default=0),
        optimizer=states * stretch // (FLOAT * total) if total else 0,
        buffers=FLOAT * launch.bucket * launch.buffers,
    )
    if launch.offload_optimizer:
        largest = FLOAT * max(map(max, groups.values()), default=0)
        moved = {"copies": stretch, "gradients": stretch, "optimizer": whole.optimizer, "buffers": stretch + largest}
        return replace(whole, copies=0, gradients=0, optimizer=0, buffers=whole.buffers + largest, host=moved)
    if launch.kind == "zero1" and accumulation > 1:
        return replace(whole, gradients=max(whole.gradients, FLOAT * total))
    return whole


def _pieces(weights: Sequence[Weight], launch: Launch, world: int, states: int) -> Held:
    """ZeRO-3: of every tensor each process has a piece, and small ones it also has whole."""
    small, large = _by_size(weights, launch)
    total = sum(one.numbers for one in weights if trains(one))
    piece = FLOAT * sum(_piece(one, world) for one in weights if trains(one))

    def cut(kind: Callable[[Weight], bool]) -> int:
        return sum(_piece(one, world) * one.itemsize for one in weights if kind(one) and one.dealt)

    def kept(kind: Callable[[Weight], bool]) -> int:
        beside = sum(one.numbers * one.itemsize for one in weights if kind(one) and not one.dealt)
        return beside + _bytes(small, kind)

    numbers = sum(one.numbers for one in large)
    share = min(1.0, (launch.reuse // 2 + launch.prefetch) / numbers) if numbers else 0.0
    optimizer = states * piece // (FLOAT * total) if total else 0
    parts = {"frozen": cut(frozen), "trained": cut(trains), "copies": piece, "gradients": piece, "optimizer": optimizer}
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
        gathered=round(_whole(large, 1) * share),
        host=host,
    )


def _rows(weights: Sequence[Weight], launch: Launch, world: int, states: int) -> Held:
    """FSDP2: tensors are cut along their first axis. The optimizer moves the pieces themselves."""
    dealt = [one for one in weights if one.dealt and one.shape]
    total = sum(one.numbers for one in weights if trains(one))
    pieces = {
        kind.__name__: sum(_row(one, world) * one.itemsize for one in dealt if kind(one)) for kind in (frozen, trains)
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
        return replace(
            found, frozen=beside, trained=0, gradients=0, optimizer=0, host={**host, "optimizer": optimizer}
        )
    return found


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


def _by_size(weights: Iterable[Weight], launch: Launch) -> tuple[list[Weight], list[Weight]]:
    dealt = [one for one in weights if one.dealt]
    small = [one for one in dealt if one.numbers <= launch.persistent]
    return small, [one for one in dealt if one.numbers > launch.persistent]


def _groups(weights: Iterable[Weight]) -> dict[str, list[int]]:
    """Numbers of each tensor, in the order that they have in the optimizer's groups."""
    groups: dict[str, list[int]] = defaultdict(list)
    for one in weights:
        if one.group is not None:
            groups[one.group].append(one.numbers)
    return groups


def _reaching(sizes: Sequence[int], stretch: int, rank: int) -> int:
    """Numbers of tensors that reach into a process's stretch, with what the last one has of padding."""
    start, end, place, found = rank * stretch, (rank + 1) * stretch, 0, 0
    for size in sizes:
        if place < end and place + size > start:
            found += size
        place += size
    return found


def _bytes(weights: Iterable[Weight], wanted: Callable[[Weight], bool]) -> int:
    return sum(one.numbers * one.itemsize for one in weights if wanted(one))


def _whole(weights: Iterable[Weight], world: int) -> int:
    """Bytes of tensors that are gathered, padding included."""
    return sum(_padded(one.numbers, world) * one.itemsize for one in weights)


def _piece(one: Weight, world: int) -> int:
    return -(-one.numbers // world)


def _row(one: Weight, world: int) -> int:
    """Numbers in the rows of a tensor that a process has."""
    first, *rest = one.shape
    return -(-first // world) * math.prod(rest)


def _padded(numbers: int, multiple: int) -> int:
    return -(-numbers // multiple) * multiple
