"""What a run checks about itself: that all that should learn can, that nothing is infinite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from finetune.adapter import ParameterGroup
from finetune.engines import Reached
from finetune.errors import GuardError


def require_one_home(
    networks: nn.ModuleDict, groups: Sequence[ParameterGroup], optimizer: torch.optim.Optimizer
) -> None:
    """Every parameter that takes gradients is in the adapter's groups, and in the optimizer exactly once.

    Raises:
        GuardError: some are not; it names them. Or there is nothing to train.
    """
    named = {id(value): name for group in groups for name, value in group.parameters.items()}
    if not named:
        raise GuardError("nothing to train: the adapter has no parameter")
    if frozen := [name for group in groups for name, value in group.parameters.items() if not value.requires_grad]:
        raise GuardError(f"the adapter lists frozen parameters, which would never move: {_list(frozen)}")
    counts: dict[int, int] = {}
    for group in optimizer.param_groups:
        for value in group["params"]:
            counts[id(value)] = counts.get(id(value), 0) + 1
    if wrong := [f"{name} ({counts.get(key, 0)} times)" for key, name in named.items() if counts.get(key, 0) != 1]:
        raise GuardError(f"not exactly once in the optimizer: {_list(wrong)}")
    loose = [name for name, value in networks.named_parameters() if value.requires_grad and id(value) not in named]
    if loose:
        raise GuardError(f"these take gradients but belong to no group of the adapter: {_list(loose)}")


class GradientWatch:
    """Sees to it, in the first updates, that a gradient reaches every trained tensor.

    After one update no gradient may be missing: the tensor would have no part in the loss. After ``patience`` updates
    of its group none may have been zero each time.
    """

    def __init__(self, groups: Sequence[ParameterGroup]) -> None:
        self._silent = {name: value for group in groups for name, value in group.parameters.items()}
        self._patience = {name: group.patience for group in groups for name in group.parameters}
        self._updates = 0

    def look(self, reached: Callable[[Sequence[nn.Parameter]], list[Reached]]) -> None:
        """Look at the gradients of one update, before the optimizer takes them.

        Args:
            reached: an engine's.

        Raises:
            GuardError: some tensor learns nothing; it names them.
        """
        if not self._silent:
            return
        self._updates += 1
        came = dict(zip(self._silent, reached(list(self._silent.values())), strict=True))
        missing = [name for name, what in came.items() if what is Reached.NOT]
        if missing and self._updates == 1:
            raise GuardError(f"no gradient reaches {_list(missing)}: the loss does not depend on them")
        self._silent = {name: value for name, value in self._silent.items() if came[name] is not Reached.MOVED}
        if late := [name for name in self._silent if self._patience[name] <= self._updates]:
            raise GuardError(f"the gradient of {_list(late)} was zero in each of the first {self._updates} updates")


def require_finite_losses(losses: Tensor, pictures: Sequence[Sequence[str]], step: int) -> None:
    """Every loss of an update is finite.

    Args:
        losses: [world, micro-steps].
        pictures: per process, the ids of each micro-step's pictures, joined.
        step: the update that would follow, counted from 1.

    Raises:
        GuardError: one is not; it names the step, the process and the pictures.
    """
    where = [
        f"process {rank} ({pictures[rank][micro]})" for rank, micro in (~torch.isfinite(losses)).nonzero().tolist()
    ]
    if where:
        raise GuardError(
            f"the loss of step {step} is not finite on {'; '.join(where)}; nothing was updated. "
            "Look at these pictures and captions, or lower train.learning_rate"
        )


class NormGuard:
    """Ends a run whose gradient is not finite.

    Under float16 such gradients are how the loss scale is found, the optimizer passes over them, and only many in a
    row are wrong.

    Args:
        patience: how many in a row end the run.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._bad = 0

    def check(self, norm: float, step: int, pictures: Iterable[str]) -> None:
        """Look at one update's norm, before the optimizer.

        Raises:
            GuardError: it is not finite, and nor were those before; it names the step and its pictures.
        """
        self._bad = 0 if math.isfinite(norm) else self._bad + 1
        if self._bad == self._patience:
            raise GuardError(
                f"the gradient of step {step} is not finite, though its loss is; nothing was updated. "
                f"Pictures: {'; '.join(pictures)}"
            )


def _list(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
