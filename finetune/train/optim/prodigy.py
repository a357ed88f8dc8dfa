"""Prodigy: Adam that estimates its learning rate (Mishchenko & Defazio 2023, "Prodigy: An Expeditiously Adaptive
Parameter-Free Learner", Algorithm 4).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from finetune.train.optim.state import moving, remembered


class Prodigy(Optimizer):
    """Steps are as long as d, a growing lower bound of the distance between the start and the solution.

        m ← β1 m + (1 - β1) d g;  v ← β2 v + (1 - β2) d² g²
        r ← β3 r + γ d² ⟨g, x0 - x⟩;  s ← β3 s + γ d² g
        d' = max(d, r / ‖s‖₁);  x ← x - γ d (m / (√v + d ε) + λ x)

    The paper's (1 - β3) of r and of s cancel. Both are kept divided by d0², so that they are no tiny numbers. Each
    group has a d of its own: a text encoder is not as far from its solution as a denoiser, and phases train one after
    the other. d is kept per group, as ``d``.

    Args:
        params: parameters or groups, as of any optimizer of torch.
        lr: γ, 1 but for a schedule.
        betas: β1 and β2.
        beta3: √β2 where it is None.
        eps: ε.
        weight_decay: λ.
        d0: where d begins.
        d_coef: multiplies what is estimated.
        growth_rate: how many times larger d may become in a step.
        bias_correction: γ times √(1 - β2^t) / (1 - β1^t), as Adam has it; False is the paper's.
        safeguard_warmup: leave γ out of s.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float | None = None,
        bias_correction: bool = True,
        safeguard_warmup: bool = False,
    ) -> None:
        beta3 = math.sqrt(betas[1]) if beta3 is None else beta3
        defaults = {"lr": lr, "betas": betas, "beta3": beta3, "eps": eps, "weight_decay": weight_decay, "d0": d0}
        defaults |= {"d_coef": d_coef, "growth_rate": growth_rate}
        defaults |= {"bias_correction": bias_correction, "safeguard_warmup": safeguard_warmup}
        super().__init__(params, {**defaults, "d": d0, "r": 0.0, "k": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move what has a gradient. The host waits once per group for the new estimate."""
        for group in self.param_groups:
            parameters, gradients = moving(group)
            if parameters:
                estimate = self._estimate(group, parameters, gradients)
                self._move(group, parameters, gradients)
                group["d"] = estimate

    def _rate(self, group: dict[str, Any]) -> float:
        """γ, corrected, of the step that is being taken."""
        beta1, beta2 = group["betas"]
        bias = math.sqrt(1 - beta2 ** group["k"]) / (1 - beta1 ** group["k"]) if group["bias_correction"] else 1.0
        return float(group["lr"] * bias)

    def _estimate(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> float:
        """The next d."""
        group["k"] += 1
        d, rate = group["d"], self._rate(group)
        begun = remembered(self.state, parameters, "p0", torch.clone)
        sums = remembered(self.state, parameters, "s")
        ways = torch._foreach_sub(begun, parameters)
        products = [torch.dot(g.flatten(), way.flatten()) for g, way in zip(gradients, ways, strict=True)]
        weight = (d / group["d0"]) ** 2
        torch._foreach_mul_(sums, group["beta3"])
        torch._foreach_add_(sums, gradients, alpha=weight * (1.0 if group["safeguard_warmup"] else rate))
        # weights that rest for once keep their part of the sum: all of the group's are counted
        everywhere = [state["s"] for p in group["params"] if "s" in (state := self.state[p])]
        told = torch.stack([torch.stack(products).sum(), torch.stack(torch._foreach_norm(everywhere, 1)).sum()])
        product, length = told.tolist()
        group["r"] = group["beta3"] * group["r"] + weight * rate * product
        found = group["d_coef"] * group["r"] / length if length > 0 else 0.0
        limit = d * group["growth_rate"] if group["growth_rate"] else math.inf
        return max(d, min(found, limit))

    def _move(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        d, (beta1, beta2), rate = group["d"], group["betas"], self._rate(group)
        means = remembered(self.state, parameters, "exp_avg")
        squares = remembered(self.state, parameters, "exp_avg_sq")
        torch._foreach_mul_(means, beta1)
        torch._foreach_add_(means, gradients, alpha=d * (1 - beta1))
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, d * d * (1 - beta2))
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, d * group["eps"])
        torch._foreach_mul_(parameters, 1 - rate * d * group["weight_decay"])
        torch._foreach_addcdiv_(parameters, means, roots, -rate * d)
