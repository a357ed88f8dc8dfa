"""Randomness as a pure function: every draw is named by a seed and what it is for, never by what came before it.

Hence a resumed run draws what the uninterrupted one would have, two processes draw what one would have, and cached
equals uncached: tests can ask for identical numbers.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Part = str | int


def derive(seed: int, *parts: Part) -> int:
    """A 63-bit seed for the purpose named by ``parts``, the same on every machine and in every process.

    Args:
        seed: the run's.
        parts: purpose, then what the draw belongs to, for example ``"noise", sample_id, draw``.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *parts: Part) -> torch.Generator:
    """A fresh CPU generator for one purpose. Draws are made on the CPU so that every device sees the same numbers."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *parts))


def permutation(length: int, seed: int, *parts: Part) -> Sequence[int]:
    """The numbers 0 to ``length`` - 1 in an order named by ``seed`` and ``parts``; 8 bytes each."""
    import torch

    return array("q", torch.randperm(length, generator=generator(seed, *parts)).numpy().tobytes())
