"""CAME: confidence-guided adaptive memory-efficient optimization (Luo et al. 2023, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from finetune.train.optim.state import moving, remembered


class Came(Optimizer):
    """Adafactor whose momentum is divided by how much updates stray from it.

        u = g / √v̂,  v ← β2 v + (1 - β2) (g² + ε1);  u ← u / max(1, RMS(u) / d)
        m ← β1 m + (1 - β1) u
        s ← β3 s + (1 - β3) ((u - m)² + ε2);  θ ← θ - η (m / √ŝ + λ θ)

    Of v and s, of a matrix, only the means of rows and of columns are kept: v̂_ij = row_i col_j / mean(row). Of a vector
    v is kept whole, and m is not divided. More dimensions than two are taken as [first, all others].

    Args:
        params: parameters or groups, as of any optimizer of torch.
        lr: η.
        betas: β1, β2 and β3.
        eps: ε1 and ε2.
        clip_threshold: d.
        weight_decay: λ.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-4,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "clip_threshold": clip_threshold}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move what has a gradient."""
        for group in self.param_groups:
            for parameter, gradient in zip(*moving(group), strict=True):
                self._move(group, parameter, gradient)

    def _move(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        (beta1, beta2, beta3), (eps1, eps2) = group["betas"], group["eps"]
        flat = gradient.flatten(1) if gradient.ndim > 1 else gradient
        update = flat * self._inverse_root(parameter, "exp_avg_sq", flat.square() + eps1, beta2)
        update /= (update.square().mean().sqrt() / group["clip_threshold"]).clamp(min=1.0)
        (mean,) = remembered(self.state, [parameter], "exp_avg")
        mean.lerp_(update.view_as(mean), 1 - beta1)
        step = mean
        if gradient.ndim > 1:
            strayed = (update - mean.flatten(1)).square() + eps2
            step = mean * self._inverse_root(parameter, "exp_avg_res", strayed, beta3).view_as(mean)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(step, alpha=-group["lr"])

    def _inverse_root(self, parameter: Tensor, what: str, squares: Tensor, beta: float) -> Tensor:
        """1 / √ of the running mean of ``squares`` [n] or [n, m], of which a matrix keeps rows and columns."""
        if squares.ndim == 1:
            (whole,) = remembered(self.state, [parameter], what)
            return whole.lerp_(squares, 1 - beta).rsqrt()
        (row,) = remembered(self.state, [parameter], f"{what}_row", lambda _: torch.zeros_like(squares[:, 0]))
        (column,) = remembered(self.state, [parameter], f"{what}_col", lambda _: torch.zeros_like(squares[0]))
        row.lerp_(squares.mean(1), 1 - beta)
        column.lerp_(squares.mean(0), 1 - beta)
        return (row / row.mean()).rsqrt()[:, None] * column.rsqrt()[None]
