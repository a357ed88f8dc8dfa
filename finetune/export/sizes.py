"""How large the change is that a file makes of a model's weights, block by block."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.export.keys import Key


@dataclass(frozen=True)
class Block:
    """Layers of a network that belong together, and how large the change of their weights is (Frobenius)."""

    name: str
    layers: int
    norm: float


def blocks(file: Any, layers: Mapping[str, Mapping[str, Key]]) -> list[Block]:
    """The blocks of a file in the order of their numbers: squares of layers' norms add up to those of their block.

    Args:
        file: an open safetensors file.
        layers: name -> part -> key.
    """
    squares: dict[str, list[float]] = {}
    for parts in layers.values():
        key = next(iter(parts.values()))
        tensors = {part: file.get_tensor(one.text).float() for part, one in parts.items()}
        squares.setdefault(f"{key.network} {_block(key.word)}", []).append(_square(tensors))
    return [Block(name, len(squares[name]), sum(squares[name]) ** 0.5) for name in sorted(squares, key=_counted)]


def _counted(name: str) -> list[tuple[int, str]]:
    """Sorts "blocks.10" behind "blocks.9"."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", name)]


def _block(word: str) -> str:
    found = re.match(r"(mid_block|middle_block|[a-z_]*?(?:blocks|layers|encoder_block)_)(\d*)", word)
    return f"{found[1].rstrip('_')}.{found[2]}".rstrip(".") if found else "other"


def _square(parts: Mapping[str, Tensor]) -> float:
    """The sum of squares of a layer's change; of DoRA without its lengths, of OFT of its numbers."""
    alpha = float(parts["alpha"]) if "alpha" in parts else None
    if "down" in parts and "up" in parts:
        down, up = parts["down"].flatten(1).double(), parts["up"].flatten(1).double()
        scale = 1.0 if alpha is None else alpha / down.shape[0]
        if "mid" in parts:
            return (scale * torch.einsum("or,rs...,si->oi...", up, parts["mid"].double(), down)).square().sum().item()
        return scale**2 * max(((up.T @ up) * (down @ down.T)).sum().item(), 0.0)
    if "hada_w1_a" in parts and "hada_t1" not in parts:
        scale = 1.0 if alpha is None else alpha / parts["hada_w1_b"].shape[0]
        product = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
        return float((scale * product).square().sum())
    if any(part.startswith("lokr_") for part in parts) and "lokr_t2" not in parts:
        inner = next((len(parts[part]) for part in ("lokr_w2_b", "lokr_w1_b") if part in parts), None)
        scale = alpha / inner if alpha is not None and inner else 1.0
        one, two = (_factor(parts, f"lokr_w{number}") for number in (1, 2))
        return float(scale**2 * one.square().sum() * two.square().sum())
    return float(sum(tensor.square().sum() for part, tensor in parts.items() if part != "alpha"))


def _factor(parts: Mapping[str, Tensor], name: str) -> Tensor:
    return parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"].flatten(1)
