"""What pictures are worth, in numbers: pure functions over a judge's embeddings and readings.

The measures are those of DreamBooth (Ruiz et al. 2023, https://arxiv.org/abs/2208.12242, section 4.1 and the ablation
of the prior), with the embedded judge in place of DINO and CLIP; a star marks that (DINO*, PRES*, DIV*). Absolute
cosines of another judge mean nothing, so fidelity is read between a floor and a ceiling that are measured too.

Embeddings are float [N, D] of any length; every function normalises them and computes in float64, so that the order
of the pictures does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.randomness import generator


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of every pair, float64 [M, N], of [M, D] and [N, D]."""
    return _unit(first) @ _unit(second).T


def similarity(first: Tensor, second: Tensor) -> float:
    """Mean pairwise cosine of two sets of pictures, [M, D] and [N, D].

    Of generated pictures of a subject and real ones: subject fidelity, DINO*. Of pictures of the bare class and real
    ones of the subject: PRES*; high means that the class has collapsed into the subject.

    Raises:
        ValueError: one of the sets is empty.
    """
    if not len(first) or not len(second):
        raise ValueError("the similarity of an empty set of pictures is not defined")
    return float(cosines(first, second).mean())


def diversity(embeddings: Tensor) -> float:
    """Mean of ``1 - cosine`` over the pairs of different pictures of one prompt [N, D]: DIV*.

    0 for a generator that always draws the same picture; the order does not matter.

    Raises:
        ValueError: fewer than two pictures.
    """
    count = len(embeddings)
    if count < 2:
        raise ValueError(f"diversity needs two pictures or more, got {count}")
    pairs = torch.triu_indices(count, count, offset=1)
    apart = 1 - cosines(embeddings, embeddings)[pairs[0], pairs[1]]
    return float(apart.clamp(min=0).mean())


def normalised(value: float, floor: float, ceiling: float) -> float:
    """Where ``value`` lies between ``floor`` (0) and ``ceiling`` (1): ``(value - floor) / (ceiling - floor)``.

    Raises:
        ValueError: the ceiling is not above the floor; such a judge cannot tell subjects apart.
    """
    if not ceiling > floor:
        raise ValueError(f"the ceiling {ceiling:.3f} is not above the floor {floor:.3f}: the judge sees no difference")
    return (value - floor) / (ceiling - floor)


def accuracy(asked: Sequence[Mapping[str, str]], read: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Share of pictures in which the judge reads what the prompt named, per attribute.

    Attributes that a prompt does not name don't count for it: leave a subject's own colours out of ``asked``.

    Args:
        asked: per picture, the attributes that its prompt names.
        read: per picture, the attributes that the judge reads.
    """
    hits: dict[str, list[float]] = {}
    for wanted, found in zip(asked, read, strict=True):
        for name, value in wanted.items():
            hits.setdefault(name, []).append(float(found[name] == value))
    return {name: sum(row) / len(row) for name, row in hits.items()}


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    row = list(values)
    return sum(row) / len(row) if row else float("nan")


@dataclass(frozen=True)
class Interval:
    """A mean and where it lies with 95 % confidence."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = 10_000, level: float = 0.95) -> Interval:
    """Mean of ``values`` (one per subject) with a percentile bootstrap interval (Efron 1979), the same in every run.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("an interval of no values is not defined")
    row = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(row), (resamples, len(row)), generator=generator(seed, "bootstrap", len(row)))
    means = row[picks].mean(1)
    edges = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    return Interval(float(row.mean()), float(edges[0]), float(edges[1]))


def _unit(embeddings: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embeddings.double(), dim=-1)
