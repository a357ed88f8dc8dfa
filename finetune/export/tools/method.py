"""How adapters are merged: what is asked, and what becomes of one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from finetune.errors import UserError, nearest
from finetune.export.tools import combine

FACTORS = ("sum", "concat")
"""Methods that need no whole change of a layer."""
METHODS = (*FACTORS, "svd", "ties", "dare-sum", "dare-ties")


@dataclass(frozen=True)
class Method:
    """What is asked.

    Attributes:
        name: of ``METHODS``.
        weights: of each adapter.
        density: of TIES: the share of numbers that is kept of each adapter.
        drop: of DARE: the probability that a number is dropped.
        seed: of DARE's draws.

    Raises:
        UserError: there is no such method, or a number is out of its range.
    """

    name: str
    weights: tuple[float, ...]
    density: float = 0.2
    drop: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise UserError(f"there is no method {self.name!r} of merging{nearest(self.name, METHODS)}")
        if not 0 < self.density <= 1:
            raise UserError(f"density is {self.density:g}; expected a share above 0, up to 1")
        if not 0 <= self.drop < 1:
            raise UserError(f"drop is {self.drop:g}; expected a probability from 0 on, below 1")

    def settings(self) -> dict[str, str]:
        """What a header says of it."""
        said = {"method": self.name, "weights": ", ".join(f"{weight:g}" for weight in self.weights)}
        if self.name == "ties":
            said["density"] = f"{self.density:g}"
        if self.name.startswith("dare"):
            said |= {"drop": f"{self.drop:g}", "seed": str(self.seed)}
        return said


class Changes(Protocol):
    """Whole changes of an adapter by the names of layers."""

    def __contains__(self, name: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def change(self, name: str) -> Tensor:
        """float32 [out, in, ...]."""
        ...


def whole(method: Method, adapters: Sequence[Changes]) -> Callable[[str], Tensor]:
    """The merged change of a layer, float32 [out, in, ...], by the methods that need whole changes."""
    thresholds: Mapping[int, float] = {}
    if method.name == "ties":
        thresholds = {
            place: combine.threshold(lambda one=one: (one.change(name) for name in one), method.density)  # type: ignore[misc]
            for place, one in enumerate(adapters)
        }

    def merged(name: str) -> Tensor:
        held = [place for place, adapter in enumerate(adapters) if name in adapter]
        changes, weights = [adapters[place].change(name) for place in held], [method.weights[place] for place in held]
        if method.name == "ties":
            changes = [combine.trimmed(one, thresholds[place]) for place, one in zip(held, changes, strict=True)]
        if method.name.startswith("dare"):
            changes = [
                combine.dropped(one, method.drop, method.seed, place, name)
                for place, one in zip(held, changes, strict=True)
            ]
        return (combine.elected if method.name.endswith("ties") else combine.weighted_sum)(changes, weights)

    return merged
