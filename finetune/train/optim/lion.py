"""Lion: evolved sign momentum (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", Algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from finetune.train.optim.state import moving, remembered


class Lion(Optimizer):
    """Every number moves by the learning rate, in the direction of its interpolated momentum.

        c = β1 m + (1 - β1) g;  θ ← θ - η (sign(c) + λ θ);  m ← β2 m + (1 - β2) g

    Args:
        params: parameters or groups, as of any optimizer of torch.
        lr: η.
        betas: β1 and β2.
        weight_decay: λ.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move what has a gradient."""
        for group in self.param_groups:
            parameters, gradients = moving(group)
            if not parameters:
                continue
            rate, (beta1, beta2) = group["lr"], group["betas"]
            momenta = remembered(self.state, parameters, "exp_avg")
            directions = torch._foreach_lerp(momenta, gradients, 1 - beta1)
            torch._foreach_sign_(directions)
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
            torch._foreach_add_(parameters, directions, alpha=-rate)
            torch._foreach_lerp_(momenta, gradients, 1 - beta2)
