"""The loop of every stage: AdamW, a rate that warms up and falls, averaged weights, checkpoints, a log.

Two single-threaded processes that average their gradients train a small network faster than one process with two
threads, so a stage may run in several ``workers``. What a step computes depends on ``(seed, step, rank)`` alone, and a
checkpoint holds everything else, so that an interrupted stage goes on as if nothing had happened.
"""

from __future__ import annotations

import copy
import math
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

LossOf = Callable[[nn.Module, int, torch.Generator], Tensor]
"""Mean loss of a batch, given the network, the step and this process's generator for the step."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast: the rate warms up, is held for ``hold`` of the steps, and falls to ``final`` of its peak.

    While the rate is held, a run does not depend on ``steps``: a longer one may go on from its checkpoints.
    """

    steps: int
    rate: float
    warmup: int = 100
    hold: float = 0.05
    final: float = 0.02
    average: float = 0.999
    decay: float = 0.01
    seed: int = 0
    save_every: int = 250
    log_every: int = 25


def rate_at(plan: Plan, step: int) -> float:
    """Linear warm-up, the peak, then a cosine down to ``final`` times the peak."""
    if step < plan.warmup:
        return plan.rate * (step + 1) / plan.warmup
    start = max(plan.warmup, int(plan.steps * plan.hold))
    way = max(0, step - start) / max(1, plan.steps - start)
    return plan.rate * (plan.final + (1 - plan.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, way))))


def generator_for(seed: int, step: int, rank: int) -> torch.Generator:
    """The randomness of one process in one step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 64 + rank)


def fit(
    network: nn.Module,
    loss_of: LossOf,
    plan: Plan,
    folder: Path,
    *,
    at_save: Callable[[nn.Module, int], None] | None = None,
) -> nn.Module:
    """Train ``network`` and return the moving average of its weights; resumes from ``folder``.

    Every process of the group calls this with the same weights; only rank 0 writes.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    averaged = copy.deepcopy(network).eval().requires_grad_(False)
    weights: list[Tensor] = [weight for weight in network.parameters() if weight.requires_grad]
    followers: list[Tensor] = [
        a for a, w in zip(averaged.parameters(), network.parameters(), strict=True) if w.requires_grad
    ]
    optimizer = torch.optim.AdamW(weights, lr=plan.rate, weight_decay=plan.decay, betas=(0.9, 0.99))
    checkpoint, done = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["network"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    folder.mkdir(parents=True, exist_ok=True)
    begun, spoken = time.monotonic(), done
    running = torch.zeros(())
    for step in range(done, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(plan, step)
        loss = loss_of(network, step, generator_for(plan.seed, step, rank))
        loss.backward()
        if world > 1:
            _average_gradients(weights, world)
        norm = nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        keep = min(plan.average, (step + 1) / (step + 10))
        torch._foreach_lerp_(followers, weights, 1 - keep)
        running += loss.detach()
        if rank == 0 and (step + 1) % plan.log_every == 0:
            seconds = time.monotonic() - begun
            mean = float(running) / (step + 1 - spoken)
            running.zero_()
            spoken = step + 1
            pace = (step + 1 - done) / seconds
            _say(folder, f"step {step + 1}/{plan.steps} loss {mean:.5f} norm {float(norm):.3f} {pace:.2f} steps/s")
        if rank == 0 and ((step + 1) % plan.save_every == 0 or step + 1 == plan.steps):
            state = {"network": network.state_dict(), "averaged": averaged.state_dict()}
            part = checkpoint.with_suffix(".part")
            torch.save({**state, "optimizer": optimizer.state_dict(), "step": step + 1}, part)
            part.replace(checkpoint)
            if at_save is not None:
                at_save(averaged, step + 1)
    return averaged


def _average_gradients(weights: list[Tensor], world: int) -> None:
    """One all-reduce of all gradients together."""
    gradients = [weight.grad if weight.grad is not None else torch.zeros_like(weight) for weight in weights]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients]) / world
    dist.all_reduce(flat)
    for weight, part in zip(weights, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        weight.grad = part.view_as(weight)


def _say(folder: Path, line: str) -> None:
    with (folder / "log.txt").open("a") as log:
        log.write(f"{time.strftime('%H:%M:%S')} {line}\n")


def _enter(rank: int, stage: Callable[..., None], workers: int, port: int, arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    try:
        stage(*arguments)
    finally:
        dist.destroy_process_group()


def in_workers(stage: Callable[..., None], workers: int, *arguments: object) -> None:
    """Run ``stage(*arguments)`` in ``workers`` single-threaded processes that share a gloo group (1: right here)."""
    if workers == 1:
        torch.set_num_threads(1)
        stage(*arguments)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_enter, (stage, workers, port, arguments), nprocs=workers)
