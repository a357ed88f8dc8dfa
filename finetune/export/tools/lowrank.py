"""The best factors of a rank for a change of weights, and how the rank is chosen.

``D = U diag(s) V^T`` cut off behind the r largest singular values is the matrix of rank r that is nearest to ``D``
(Eckart and Young 1936); its error is the root of the sum of the squares that were cut off. A convolution is taken as
the matrix [out, in * kh * kw].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.export.layers import Layer


@dataclass(frozen=True)
class Rule:
    """How many singular values of a layer are kept: the fewest that fulfil what is asked, at least one.

    Attributes:
        rank: at most so many.
        energy: the sum of their squares is at least this share of all.
        frobenius: the root of that sum is; kohya's ``sv_fro``.
        cumulative: the sum of them is; kohya's ``sv_cumulative``.
        ratio: none is smaller than the largest one divided by this; kohya's ``sv_ratio``.

    Raises:
        UserError: nothing is asked, two shares are, or a number is out of its range.
    """

    rank: int | None = None
    energy: float | None = None
    frobenius: float | None = None
    cumulative: float | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in ("energy", "frobenius", "cumulative")}
        asked = [name for name, value in {**shares, "ratio": self.ratio}.items() if value is not None]
        if len(asked) > 1:
            raise UserError(f"{' and '.join(asked)} each choose a rank; give one of them, and rank as its limit")
        if not asked and self.rank is None:
            raise UserError("say a rank, or one of energy, frobenius, cumulative and ratio, which choose it by layer")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank is {self.rank}; expected at least 1")
        for name, share in shares.items():
            if share is not None and not 0 < share <= 1:
                raise UserError(f"{name} is {share:g}; expected a share above 0, up to 1")
        if self.ratio is not None and self.ratio < 1:
            raise UserError(f"ratio is {self.ratio:g}; expected at least 1")

    def choose(self, values: Tensor) -> int:
        """The rank for a layer of these singular values, the largest first. Values of nothing are never kept."""
        floor = float(values[0]) * torch.finfo(torch.float32).eps
        kept = int((values > floor).sum())
        squares = values.double().square()
        if self.energy is not None:
            kept = min(kept, _reaching(squares, self.energy))
        if self.frobenius is not None:
            kept = min(kept, _reaching(squares, self.frobenius**2))
        if self.cumulative is not None:
            kept = min(kept, _reaching(values.double(), self.cumulative))
        if self.ratio is not None:
            kept = min(kept, int((values >= values[0] / self.ratio).sum()))
        return max(1, min(kept, self.rank or kept))

    def __str__(self) -> str:
        asked = {name: value for name, value in vars(self).items() if value is not None}
        return ", ".join(f"{name} {value:g}" for name, value in asked.items())


class Cut(NamedTuple):
    """A layer of a chosen rank.

    Attributes:
        layer: its change is ``up down``: alpha is the rank.
        kept: share of the squares of the singular values.
        squares: sum of all of them.
    """

    layer: Layer
    kept: float
    squares: float


def cut(network: str, module: str, change: Tensor, rule: Rule) -> Cut:
    """A whole change [out, in, ...] as factors, float32.

    The singular vectors of the shorter side are the eigenvectors of ``D D^T``, in float64, which loses nothing that
    float32 holds and takes a fraction of the time of a decomposition of a wide matrix.
    """
    matrix = change.flatten(1).double()
    tall = len(matrix) > matrix.shape[1]
    side = matrix.T if tall else matrix
    squares, vectors = torch.linalg.eigh(side @ side.T)
    values = squares.flip(0).clamp(min=0).sqrt()
    rank = rule.choose(values)
    short = vectors.flip(1)[:, :rank]
    long = short.T @ side / values[:rank, None].clamp(min=torch.finfo(torch.float64).tiny)
    u, v = (long.T, short.T) if tall else (short, long)
    return _cut(network, module, (u, values, v), change.shape[1:], rank)


def recut(layer: Layer, rule: Rule) -> Cut:
    """A layer of another rank. The decomposition is that of its factors' small triangles, in float64:
    ``B A = Q_b (R_b R_a^T) Q_a^T``. DoRA's lengths stay.
    """
    left, right = torch.linalg.qr(layer.up.double().flatten(1)), torch.linalg.qr(layer.down.double().flatten(1).T)
    u, values, v = torch.linalg.svd(layer.scale * left.R @ right.R.T)
    parts = (left.Q @ u, values, v @ right.Q.T)
    found = _cut(layer.network, layer.module, parts, layer.down.shape[1:], rule.choose(values))
    return found._replace(layer=replace(found.layer, magnitude=layer.magnitude))


def total_kept(cuts: Sequence[tuple[float, float]]) -> float:
    """The share of squares kept over several layers, of (kept, squares) of each."""
    whole = sum(squares for _, squares in cuts)
    return sum(kept * squares for kept, squares in cuts) / whole if whole else 1.0


def _cut(network: str, module: str, parts: tuple[Tensor, Tensor, Tensor], inputs: Sequence[int], rank: int) -> Cut:
    """The first ``rank`` of the triples u [out, .], values, v [., in]; all values are given."""
    u, values, v = parts
    signs = torch.sign(u[:, :rank].gather(0, u[:, :rank].abs().argmax(0, keepdim=True)))  # which are arbitrary
    roots = values[:rank].sqrt()
    up = (u[:, :rank] * signs * roots).float()
    down = (v[:rank] * signs.T * roots[:, None]).float()
    layer = Layer(
        network=network,
        module=module,
        down=down.reshape(rank, *inputs),
        up=up.reshape(len(up), rank, *[1] * (len(inputs) - 1)),
        alpha=float(rank),
    )
    squares = values.double().square()
    whole = float(squares.sum())
    return Cut(layer, float(squares[:rank].sum()) / whole if whole else 1.0, whole)


def _reaching(values: Tensor, share: float) -> int:
    """How many of the first values add up to a share of all of them."""
    sums = values.cumsum(0)
    return int((sums < share * sums[-1] * (1 - 1e-12)).sum()) + 1
