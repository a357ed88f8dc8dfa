"""The update cycle: accumulate, check, clip, step, average, log, save, resume; on one process or many."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from finetune.adapter import Adapter, Weights
from finetune.batch import Batch
from finetune.config.schema import Recipe
from finetune.distributed import Processes
from finetune.engines.pieces import require_plain
from finetune.errors import Stopped, UserError
from finetune.randomness import derive
from finetune.train import checkpoint, optimizers, schedules
from finetune.train.checkpoint import Snapshot
from finetune.train.ema import Ema
from finetune.train.fitting import require_fitting, samples_per_step
from finetune.train.gathering import gather_weights, memory_of, scatter_weights
from finetune.train.guards import GradientWatch, NormGuard, require_finite_losses, require_one_home
from finetune.train.log import Log, peak_memory
from finetune.train.optimizer_state import load_state_by_name, state_by_name
from finetune.train.run import fingerprint, open_run, versions
from finetune.train.signals import Signals
from finetune.train.trainee import Losses, Trainee, place

_PATIENCE = 50  # float16 updates in a row whose gradients may overflow while the loss scale comes down


class Batches(Protocol):
    """Endless batches of one process, which can be begun at any step."""

    def from_step(self, step: int) -> Iterator[Batch]:
        """Batches from optimizer step ``step`` on, ``gradient_accumulation_steps`` of them a step."""
        ...


class Trainer:
    """Owns what every recipe would otherwise copy; the recipe keeps the loss and the order of events.

        trainer = Trainer(recipe, processes, family.networks, adapter, loss)
        for batch in trainer.steps(batches):
            trainer.update(batch)
        weights = trainer.finish()

    Args:
        recipe: ``output``, ``seed``, ``train`` and ``checkpoint`` are read.
        networks: a family's; moved to the device, but for those that the engine moves itself. Those that hold trained
            weights go to ``train()``.
        adapter: what is trained.
        loss: maps a batch to a scalar, or to a ``NamedTuple`` of scalars with a ``total``, through ``networks``.

    Raises:
        GuardError: a trained parameter is not in the optimizer exactly once, or there is none.
        UserError: the output folder holds another run, or the optimizer cannot be had.
    """

    def __init__(
        self,
        recipe: Recipe,
        processes: Processes,
        networks: nn.ModuleDict,
        adapter: Adapter,
        loss: Callable[[Batch], Tensor | Losses],
    ) -> None:
        self.recipe, self.processes, self.adapter = recipe, processes, adapter
        self.folder = open_run(recipe, processes)
        self.step = 0
        self._groups = adapter.groups()
        self._parameters = {name: value for group in self._groups for name, value in group.parameters.items()}
        for parameter in self._parameters.values():
            parameter.data = parameter.data.float()  # half-precision weights would lose small updates
        self._shapes = {name: value.shape for name, value in self._parameters.items()}
        train = recipe.train
        optimizer = optimizers.build_optimizer(train.optimizer, self._groups, train.peak_learning_rate)
        require_one_home(networks, self._groups, optimizer)
        if processes.shards_weights:
            require_plain(recipe, processes.engine_name)
            adapter.share_networks()
        also = ["denoiser"] if processes.shards_weights else []
        self._trainee = Trainee(networks, loss, adapter.penalty, also)
        place(networks, processes.device, but=set(self._trainee.networks) if processes.shards_weights else ())
        outside = list(self._parameters.values()) if type(adapter).penalty is not Adapter.penalty else []
        self._engine = processes.engine(self._trainee, optimizer, adapter.phased, outside)
        if train.ema and optimizers.averages(optimizer):
            raise UserError(f"train.ema is set, but {train.optimizer.name} exports an average of its own")
        with self._whole():
            self._ema = Ema(train.ema, self._parameters) if train.ema else None
        self._watch: GradientWatch | None = None
        self._moved: frozenset[str] = frozenset()  # groups
        self._norms = NormGuard(_PATIENCE if self._engine.scales_loss else 1)
        self._pictures: dict[str, str] = {}
        self._log: Log | None = None
        self._signals = Signals()
        self._stopping: str | None = None
        self._updated = False
        adapter.begin_run(train.total_steps)
        self._begin_step()

    def steps(self, batches: Batches) -> Iterator[Batch]:
        """Yield batches until ``train.total_steps`` updates are done; ``update`` must be called with each.

        Continues from the newest valid checkpoint of the run's folder. Saves one where it is due, at the end and on a
        signal, always after the loop's body.

        Raises:
            UserError: the checkpoint is of other pictures, another batch, or a longer run.
            Stopped: a signal came; the checkpoint is written.
        """
        self._pictures = dict(getattr(batches, "hashes", {}))
        self._resume()
        total, every = self.recipe.train.total_steps, self.recipe.checkpoint.every
        if self.step == total:
            self.processes.say(f"already trained: {self.folder.path} holds all {total} steps")
            return
        with Log(self.folder, self.processes, self.step, total) as self._log, self._signals:
            self._begin_step()
            for batch in batches.from_step(self.step):
                with self._engine.accumulating():
                    yield batch.to(self.processes.device)
                if not self._updated:
                    continue
                if self._stopping or self.step == total or (every and self.step % every == 0):
                    self._save()
                if self.step == total:
                    return
                if self._stopping:
                    raise Stopped(f"{self._stopping}: stopped after step {self.step}; start again to continue")
                self._begin_step()

    def update(self, batch: Batch) -> Tensor:
        """Forward, backward, and where an accumulation ends an optimizer step. Returns the loss, detached.

        Raises:
            GuardError: a loss or gradient is not finite on some process, or one of the first updates leaves a
                parameter without gradient. The weights are as before the update.
        """
        self._updated = False
        torch.manual_seed(derive(self.recipe.seed, "update", self.step, len(self._losses), self.processes.rank))
        inputs = replace(batch, agree=self.processes.most) if self._engine.sharded else batch
        losses = self._engine.forward(inputs)
        self._losses.append({name: value.detach() for name, value in losses.items()})
        self._ids.append(", ".join(batch.ids))
        self._count += len(batch)
        values = self._agree() if self._engine.boundary else {}
        rates = self._set_rates()  # before backward: under DeepSpeed, backward itself takes the step
        self._engine.backward(losses["total"])
        if self._engine.boundary:
            self._finish_step(values | rates)
        return losses["total"].detach()

    def every(self, steps: int | None) -> bool:
        """True once, right after each ``steps``-th update; never for None."""
        return steps is not None and self._updated and self.step % steps == 0

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the networks hold what would be exported: the average, where there is one, or the optimizer's.

        Every process must call it.
        """
        optimizer = self._engine.optimizer
        with self._engine.drawing():
            if self._ema:
                with self._ema.swapped():
                    yield
            elif optimizers.averages(optimizer):
                with optimizers.evaluated(optimizer):
                    yield
            else:
                yield

    def finish(self) -> list[Weights]:
        """The trained weights, those of each part of the adapter for itself.

        From here on the networks hold just these, in ``eval()``. Every process must call it.
        """
        self._engine.release()
        if self._ema:
            self._ema.keep()
        elif optimizers.averages(self._engine.optimizer):
            self._engine.optimizer.eval()  # type: ignore[attr-defined]
        self._trainee.eval()
        self.processes.barrier()
        return [part.weights() for part in self.adapter.parts()]

    @property
    def log(self) -> Log:
        """Where the loop's body may add pictures and lines."""
        if self._log is None:
            raise RuntimeError("there is a log only inside the loop over steps()")
        return self._log

    def _begin_step(self) -> None:
        self._losses: list[dict[str, Tensor]] = []
        self._ids: list[str] = []
        self._count = 0
        self._began = time.perf_counter()
        self.processes.doing(f"step {self.step + 1}")
        self.adapter.begin_step(self.step)

    def _agree(self) -> dict[str, float]:
        """Mean losses over micro-steps and processes, after making sure that all are finite; and whether to stop.

        The one place where processes exchange numbers, and the one where the host waits for the forward pass.
        """
        names = list(self._losses[0])
        rows = [torch.stack([losses[name] for name in names]) for losses in self._losses]
        wish = torch.full_like(rows[0], float(self._signals.name is not None))
        told = self.processes.gather(torch.stack([*rows, wish]))  # [world, micro-steps + 1, losses]
        losses = told[:, :-1]
        if not bool(torch.isfinite(losses).all()):
            require_finite_losses(losses.sum(-1), self.processes.gather_object(self._ids), self.step + 1)
        if bool(told[:, -1].any()):
            self._stopping = self._signals.name or "a signal to another process"
        means = losses.double().mean((0, 1)).tolist()
        return {"loss" if name == "total" else f"loss_{name}": mean for name, mean in zip(names, means, strict=True)}

    def _set_rates(self) -> dict[str, float]:
        rate = schedules.rate(self.recipe.train.schedule, self.step, self.recipe.train.total_steps)
        found = optimizers.set_rates(self._engine.optimizer, rate)
        return {f"learning_rate_{name}": value for name, value in found.items()}

    def _finish_step(self, values: dict[str, float]) -> None:
        self._rest()
        limits = self.recipe.train.max_grad_norm, self.recipe.train.max_grad_value
        norm = float(self._engine.clip(list(self._parameters.values()), *limits))
        self._norms.check(norm, self.step + 1, self._ids)
        if self._watch:
            self._watch.look(self._engine.reached)
        self._engine.step()
        rates = optimizers.rates(self._engine.optimizer)
        with self._whole(change=True) if self.adapter.bounded else nullcontext():
            self.adapter.end_step(rates)
        self.step += 1
        self._updated = True
        if self.step == 1:
            state_by_name(self._engine.optimizer, self._groups)  # what no checkpoint can hold is found out now
        if self._ema:
            with self._whole():
                self._ema.update(self.step)
        seconds = time.perf_counter() - self._began
        pace = self._count * self.processes.world / seconds
        memory = peak_memory(self.processes.device)
        measured = {"grad_norm": norm, "seconds": seconds, "samples_per_second": pace, "peak_memory": memory}
        self.log.record(self.step, values | measured)

    def _rest(self) -> None:
        """Leave groups that rest out of the update; and watch those that move for the first time."""
        resting = self.adapter.resting(self.step)
        self._engine.rest(resting)
        moving = frozenset(group.name for group in self._groups) - resting
        if fresh := moving - self._moved:  # all at first, and those that a pivot wakes
            self._watch = GradientWatch([group for group in self._groups if group.name in fresh])
        self._moved |= moving

    def _save(self) -> None:
        facts = {
            "recipe": fingerprint(self.recipe),
            "world": self.processes.world,
            "samples_per_step": samples_per_step(self.recipe.train, self.processes.world),
            "scaler": self._engine.scaler_state(),
            "pictures": self._pictures,
            "versions": versions(),
        }
        average, main = self._ema.state() if self._ema else {}, self.processes.is_main
        memory = state_by_name(self._engine.optimizer, self._groups, memory_of(self._engine, main))
        trained = gather_weights(self._engine, self._parameters, main)
        saved = Snapshot(self.step, trained, average, memory, facts)
        keep = self.recipe.checkpoint.keep
        self.processes.on_main(
            lambda: checkpoint.save(self.folder.checkpoints, saved, keep),
            f"writing the checkpoint of step {self.step}",
        )

    def _resume(self) -> None:
        if not self.recipe.checkpoint.resume:
            return
        path = self.processes.on_main(lambda: checkpoint.newest(self.folder.checkpoints), "reading checkpoints")
        if path is None:
            return
        saved = checkpoint.load(path)
        world, run = self.processes.world, self.folder.path
        require_fitting(saved, self.recipe.train, world, self._shapes, self._pictures, run)
        scatter_weights(self._engine, self._parameters, saved.trained)
        load_state_by_name(self._engine.optimizer, self._groups, saved.optimizer, self._engine.remember)
        self._engine.load_scaler_state(saved.facts["scaler"])
        if self._ema:
            self._ema.load(saved.average)
        self.step = saved.step
        self._moved = frozenset(group.name for group in self._groups) if self.step > 1 else frozenset()
        self.processes.say(f"continuing from {path}")

    def _whole(self, change: bool = False) -> AbstractContextManager[None]:
        return self._engine.whole(list(self._parameters.values()), change)
