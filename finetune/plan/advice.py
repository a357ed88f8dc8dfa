"""Which launch profile to take: the simplest under which a run fits, and why."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Final

from finetune.adapter import Adapter
from finetune.config import Recipe
from finetune.config.schema import ModelPrior
from finetune.engines.pieces import require_divisible, require_plain
from finetune.errors import UserError
from finetune.family import ModelFamily
from finetune.plan.contents import Advice, Memory, Way
from finetune.plan.held import held
from finetune.plan.inventory import inventory
from finetune.plan.launches import NAMES, Kind, Launch, launches
from finetune.plan.memory import networks_held, state_bytes
from finetune.plan.render import count, size
from finetune.plan.traffic import Passes, traffic
from finetune.plan.weights import Weight, bytes_of, trains

_ORDER: Final[Mapping[Kind, int]] = {"alone": 0, "ddp": 1, "zero1": 2, "zero2": 3, "fsdp2": 4, "zero3": 5}
"""What knows the least of pieces comes first, and it also sends the least."""
_WHOLE = Launch(name="whole", kind="alone")


def advise(
    recipe: Recipe,
    family: ModelFamily,
    adapter: Adapter,
    memory: Memory,
    processes: int,
    room: int | None,
    file: str,
) -> Advice:
    """Compare the launch profiles that ``recipe`` could be started with on ``processes`` processes.

    Args:
        family, adapter: as ``finetune.plan.memory.estimate`` leaves them.
        memory: of a process that has everything whole.
        room: bytes that a process may take on its GPU; None where nothing says.
        file: where the recipe is from, with what is set beside it.
    """
    weights = inventory(family.networks, adapter.groups(), sorted(networks_held(recipe, family)))
    states = state_bytes(recipe, adapter)
    chosen = _candidates(recipe, processes)
    ways = tuple(_way(recipe, one, weights, memory, states, processes) for one in chosen)
    return _advice(ways, bytes_of(weights, trains) // 4, processes, room, file)


def refusal(recipe: Recipe, launch: Launch) -> str | None:
    """What training would say to ``recipe`` under ``launch``, where it would not begin."""
    try:
        if launch.kind not in ("alone", "ddp"):
            require_divisible(recipe.train, "FSDP2" if launch.kind == "fsdp2" else "ZeRO")
        if launch.deals_weights:
            require_plain(recipe, NAMES[launch.kind])
    except UserError as error:
        return str(error)
    return None


def _candidates(recipe: Recipe, processes: int) -> list[Launch]:
    """Of one machine and without a disk of its own, the simplest first.

    Alone, only what offloads can be of use beside plain training.
    """
    on_cpu = recipe.train.device == "cpu"
    found = [one for one in launches().values() if one.machines == 1 and not one.disk]
    found = [one for one in found if one.cpu == on_cpu or one.kind not in ("alone", "ddp")]
    if processes == 1:
        found = [one for one in found if one.kind == "alone" or one.offload_optimizer]
    else:
        found = [one for one in found if one.kind != "alone"]
    return sorted(found, key=lambda one: (one.offload_optimizer, _ORDER[one.kind], one.name))


def _way(recipe: Recipe, launch: Launch, weights: Sequence[Weight], memory: Memory, states: int, processes: int) -> Way:
    if refused := refusal(recipe, launch):
        return Way(launch=launch.name, refused=refused)
    accumulation = recipe.train.gradient_accumulation_steps
    whole = held(weights, _WHOLE, 1, states)
    mine = held(weights, launch, processes, states, accumulation)
    # two answers of the model that trains and one of the untouched model
    own = isinstance(recipe.prior, ModelPrior)
    passes = Passes(3 if own else 1, 2 if own else 1, accumulation)
    phases = {"a step": memory.total - whole.device + mine.device, **memory.phases}
    pieces = mine.frozen + mine.trained if launch.deals_weights else 0
    if "drawing" in phases and recipe.samples.every:
        phases["drawing"] += mine.optimizer + mine.copies + pieces - states
    phase = max(phases, key=lambda name: phases[name])
    sent = traffic(weights, launch, processes, passes).sent(processes)
    loading = whole.frozen + whole.trained if launch.deals_weights else 0  # cut there, and put together at the end
    host = memory.host + max(mine.on_host, loading)
    return Way(launch=launch.name, bytes=phases[phase], phase=phase, host=host, sent=sent)


def _advice(ways: Sequence[Way], trained: int, processes: int, room: int | None, file: str) -> Advice:
    possible = [way for way in ways if not way.refused]
    fitting = [way for way in possible if room is None or way.bytes <= room]
    taken = fitting[0] if fitting else None
    return Advice(
        processes=processes,
        room=room,
        ways=tuple(ways),
        launch=taken.launch if taken else None,
        reason=_reason(possible, taken, trained, processes, room),
        command=_command(taken.launch, processes, file) if taken else None,
    )


def _reason(possible: Sequence[Way], taken: Way | None, trained: int, processes: int, room: int | None) -> str:
    first, least = possible[0], min(possible, key=lambda way: way.bytes)
    where = "one process" if processes == 1 else f"{processes} processes"
    if taken is None:
        assert room is not None
        return (
            f"nothing fits into {size(room)} on {where}: the least is {least.launch} with {size(least.bytes)}, in "
            f"{least.phase}; see the profiles, and docs/memory.md"
        )
    if taken is not first:
        return (
            f"{first.launch} needs {size(first.bytes)} and {size(room or 0)} are there; {taken.launch} on {where} fits "
            f"with {size(taken.bytes)}"
        )
    fits = f"fits into {size(room)} with {size(taken.bytes)}" if room else f"needs {size(taken.bytes)}"
    saving = "nothing else would save memory"
    if least.bytes < taken.bytes:
        saving = f"{least.launch} would save {size(taken.bytes - least.bytes)} and send {size(least.sent)} in a step"
        if taken.sent:
            saving += f" instead of {size(taken.sent)}"
    unknown = "" if room else "; say --gpu-memory to have it compared with a GPU"
    return f"{count(trained)} weights train; {taken.launch} {fits}, {saving}{unknown}"


def _command(launch: str, processes: int, file: str) -> str:
    start = " ".join(["finetune train", *map(shlex.quote, shlex.split(file))])
    if processes == 1 and launch in ("single", "cpu"):
        return start
    return f"{start} --launch {launch} -- --num_processes {processes}"
