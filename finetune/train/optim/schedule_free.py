"""Schedule-free AdamW (Defazio et al. 2024, "The Road Less Scheduled", Algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from finetune.train.optim.state import moving, remembered


class ScheduleFree(Optimizer):
    """Steps are taken by z, averaged by x, and gradients are those at y between the two.

        y = (1 - β1) z + β1 x
        v ← β2 v + (1 - β2) g²;  z ← z - η (g / (√(v / (1 - β2^t)) + ε) + λ y)
        x ← (1 - c) x + c z,  c = w_t / Σ w,  w_t = t^r max(η)^p

    The parameters hold y while training, and x after ``eval()``. Of x nothing is stored: it follows from y and z. t,
    Σ w and max(η) belong to a group, which counts only the steps in which it moves.

    Args:
        params: parameters or groups, as of any optimizer of torch.
        lr: η.
        betas: β1, above 0, and β2.
        eps: ε.
        weight_decay: λ.
        r: power of the step in its weight.
        weight_lr_power: p.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "r": r}
        counted = {"k": 0, "weight_sum": 0.0, "lr_max": 0.0, "train_mode": True}
        super().__init__(params, {**defaults, "weight_lr_power": weight_lr_power, **counted})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move what has a gradient.

        Raises:
            RuntimeError: the parameters hold the average.
        """
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("the parameters hold the average: call train() before step()")
            parameters, gradients = moving(group)
            if parameters:
                self._move(group, parameters, gradients)

    def _move(self, group: dict[str, Any], y: list[Tensor], gradients: list[Tensor]) -> None:
        rate, (beta1, beta2) = group["lr"], group["betas"]
        group["k"] += 1
        group["lr_max"] = max(rate, group["lr_max"])
        weight = group["k"] ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
        group["weight_sum"] += weight
        share = weight / group["weight_sum"] if weight else 0.0
        z = remembered(self.state, y, "z", torch.clone)
        squares = remembered(self.state, y, "exp_avg_sq")

        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        roots = torch._foreach_sqrt(torch._foreach_div(squares, 1 - beta2 ** group["k"]))
        torch._foreach_add_(roots, group["eps"])
        steps = torch._foreach_div(gradients, roots)
        torch._foreach_add_(steps, y, alpha=group["weight_decay"])
        # y' = (1 - β1) z' + β1 ((1 - c) x + c z') with x and z' put in terms of y, z and the step
        torch._foreach_lerp_(y, z, share)
        torch._foreach_add_(y, steps, alpha=rate * (beta1 * (1 - share) - 1))
        torch._foreach_add_(z, steps, alpha=-rate)

    def eval(self) -> None:
        """Put x, the average, into the parameters."""
        self._switch(False)

    def train(self) -> None:
        """Put y back, up to rounding."""
        self._switch(True)

    @torch.no_grad()
    def _switch(self, to_train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] == to_train:
                continue
            group["train_mode"] = to_train
            kept = [parameter for parameter in group["params"] if "z" in self.state[parameter]]
            z = [self.state[parameter]["z"] for parameter in kept]
            beta1 = group["betas"][0]
            if kept:  # y = x + (1 - β1) (z - x), x = y + (1 - 1 / β1) (z - y)
                torch._foreach_lerp_(kept, z, 1 - beta1 if to_train else 1 - 1 / beta1)
