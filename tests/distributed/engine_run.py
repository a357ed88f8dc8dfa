"""What every engine must do besides training as one process does; run by test_profiles.py under a launcher.

``python engine_run.py FOLDER``: all runs are toys below it. ``FOLDER/moved`` holds one that one process began.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import nn
from toy_run import Denoiser, ToyBatches, build, recipe

from finetune.errors import GuardError, Stopped, UserError
from finetune.files import write_json
from finetune.train import Trainer
from finetune.train.trainee import Trainee

folder = Path(sys.argv[1])


def train(name: str, until: int | None = None, loose: bool = False, nan_at: tuple[int, ...] = (), **keys: Any) -> Any:
    """A toy run of two pictures per process and step, stopped after step ``until`` as by a signal."""
    trainer, _ = build(recipe(folder / name, **{"steps": 6, "batch_size": 2, **keys}), dropout=0.0, loose=loose)
    for batch in trainer.steps(ToyBatches(trainer.recipe, trainer.processes, nan_at)):
        trainer.update(batch)
        if trainer.step == until:
            trainer._stopping = "test"
    return trainer


def expect(kind: type[Exception], words: str, act: Callable[[], object]) -> None:
    try:
        act()
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"nobody said {words!r}")


def whole(trainer: Trainer) -> list[torch.Tensor]:
    with trainer._whole():
        return [value.detach().clone() for value in trainer._parameters.values()]


def broken(_: torch.Tensor) -> torch.Tensor:
    return torch.full_like(_, float("nan"))


def spoil_gradients() -> None:
    """A gradient that is not finite although the loss is, on one process alone."""
    trainer, networks = build(recipe(folder / "gradient", steps=6, batch_size=2), dropout=0.0)
    before = whole(trainer)
    if trainer.processes.rank == 1:
        first: nn.Module = networks["denoiser"].first  # type: ignore[union-attr, assignment]
        first.register_forward_hook(lambda _, __, answer: answer.register_hook(broken) and None)
    steps = trainer.steps(ToyBatches(trainer.recipe, trainer.processes))
    expect(GuardError, "the gradient of step 1 is not finite", lambda: trainer.update(next(steps)))
    assert all(torch.equal(one, other) for one, other in zip(before, whole(trainer), strict=True))


def change_weights() -> None:
    """What is written inside ``whole(change=True)`` is what trains on, in pieces and in the optimizer's own copies."""
    trainer, _ = build(recipe(folder / "changed", steps=6, batch_size=2, learning_rate=1e-12), dropout=0.0)
    with trainer._whole(change=True), torch.no_grad():
        for value in trainer._parameters.values():
            assert value.numel() > 0
            value.fill_(0.25)
    steps = trainer.steps(ToyBatches(trainer.recipe, trainer.processes))
    trainer.update(next(steps))
    assert all(torch.allclose(value, torch.tensor(0.25), atol=1e-6) for value in whole(trainer))


def hold_to_the_average() -> None:
    """Inside ``averaged()`` there is the average and afterwards what was trained, bit for bit."""
    trainer = train("average", ema={"decay": 0.9, "warmup": False})
    before = whole(trainer)
    with trainer.averaged():
        inside = [value.detach().clone() for value in trainer._parameters.values()]
    assert not any(torch.equal(one, other) for one, other in zip(before, inside, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(before, whole(trainer), strict=True))


def deal_out() -> None:
    """What a process holds between steps: its share of every weight where weights are dealt out, and else all."""
    with patch.object(nn.Module, "to", autospec=True, side_effect=nn.Module.to) as to:
        trainer, networks = build(recipe(folder / "share", steps=6, batch_size=2), dropout=0.0)
    moved = {type(call.args[0]) for call in to.call_args_list}
    cut = engine in ("FSDP2", "DeepSpeed ZeRO-3")
    assert bool(moved & {Denoiser, Trainee}) != cut, "what is cut is moved to the device one weight after the other"
    total = sum(value.numel() for value in Denoiser(0.0).parameters())
    for batch in trainer.steps(ToyBatches(trainer.recipe, trainer.processes)):
        trainer.update(batch)
        held = sum(_local(value).numel() for value in networks.parameters())
        everywhere = trainer.processes.gather(torch.tensor(held)).tolist()
        if engine == "FSDP2":
            assert sum(everywhere) == total and max(everywhere) <= 0.6 * total
        elif engine == "DeepSpeed ZeRO-3":
            assert held == 0, "DeepSpeed keeps pieces beside parameters"
        else:
            assert everywhere == [total, total]


def _local(value: Any) -> torch.Tensor:
    local: torch.Tensor = value.to_local() if hasattr(value, "to_local") else value
    return local


def refuse_uneven_counts() -> None:
    """A checkpoint in which the weights of a group have been moved unequally often."""
    if "ZeRO" in engine:
        expect(UserError, "unequally often", lambda: train("uneven"))


expect(GuardError, "no gradient reaches denoiser.last.loose", lambda: train("loose", loose=True))
expect(GuardError, "the loss of step 3 is not finite on process 1", lambda: train("nan", nan_at=(2, 1)))
spoil_gradients()
change_weights()
hold_to_the_average()
engine = train("which", steps=1).processes.engine_name
deal_out()
refuse_uneven_counts()
settings: dict[str, Any] = {"max_grad_value": 0.01, "optimizer": {"name": "lion"}, "learning_rate": 0.01}
values = train("values", **settings).finish()[0].tensors
expect(Stopped, "stopped after step 5", lambda: train("moved", until=5, steps=8, ema={"decay": 0.9}))
trainer = train("which", steps=1)
assert load_file(folder / "moved" / "checkpoints" / "step-000005" / "optimizer.safetensors")
if trainer.processes.is_main:
    write_json(folder / "values.json", {name: value.tolist() for name, value in values.items()})
print(f"rank {trainer.processes.rank} is content", flush=True)
