"""Factors that start at a weight's largest singular vectors (PiSSA, Meng et al. 2024,
https://arxiv.org/abs/2404.02948).

With ``W = U S V^T``: ``B0 = U_r sqrt(S_r / s)``, ``A0 = sqrt(S_r / s) V_r^T``, and while it trains the layer's own
weight is the residual ``W - s B0 A0``. What was learned is ``s (B A - B0 A0)``, a LoRA of twice the rank for ``W``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.errors import UserError


@dataclass
class Principal:
    """What a layer was before its weight became a residual.

    Attributes:
        weight: the layer's own, which has the residual in it.
        original: what was in it before.
        residual: what is in it while the factors train.
        down: A0 [r, in, ...]. up: B0 [out, r, ...].
    """

    weight: nn.Parameter
    original: Tensor
    residual: Tensor
    down: Tensor
    up: Tensor

    def put(self, share: float) -> None:
        """Let ``share`` of the residual be in place: 0 is the original, 1 the residual, both bit for bit."""
        device = self.weight.device
        self.original, self.residual = self.original.to(device), self.residual.to(device)
        ends = {0.0: self.original, 1.0: self.residual}
        self.weight.data = ends[share] if share in ends else torch.lerp(self.original, self.residual, share)

    def difference(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of twice the rank whose product is ``up down - B0 A0``."""
        return torch.cat((down, self.down.to(down))), torch.cat((up, -self.up.to(up)), dim=1)

    def without(self, name: str, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The first halves of what ``difference`` made.

        Raises:
            UserError: the second halves are not those of this layer: the base is another.
        """
        rank = self.down.shape[0]
        if not (torch.equal(down[rank:], self.down.cpu()) and torch.equal(up[:, rank:], -self.up.cpu())):
            raise UserError(f"{name}: began at other singular vectors than this base model has")
        return down[:rank], up[:, :rank]


def split(name: str, weight: nn.Parameter, rank: int, scale: float) -> Principal:
    """Make ``weight`` its residual, in place, and return what it was. Depends on the weight alone.

    Raises:
        UserError: the weight has fewer singular values than ``rank``.
    """
    original = weight.data
    matrix = original.detach().float().flatten(1)
    if rank > min(matrix.shape):
        raise UserError(f"adapter.rank: {name} has only {min(matrix.shape)} singular values, fewer than {rank}")
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    largest = u.abs().argmax(0, keepdim=True)
    sign = u.gather(0, largest).sign()  # singular vectors have none of their own
    root = (s / scale).sqrt()
    up, down = u * sign * root, (root * sign[0])[:, None] * vh
    residual = (matrix - scale * up @ down).view(original.shape).to(original.dtype)
    ones = [1] * (original.ndim - 2)
    found = Principal(weight, original, residual, down.view(rank, *original.shape[1:]), up.reshape(-1, rank, *ones))
    found.put(1.0)
    return found
