"""What the engines have in common that give each process a piece of every weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from finetune.config.memory import trains_base
from finetune.config.schema import ModelPrior, Recipe, TrainConfig
from finetune.errors import UserError

ELEMENTWISE = ("adamw", "lion", "sgd")
"""Optimizers that treat every number for itself, and so do not mind where a weight is cut."""


def clip_pieces(
    pieces: Sequence[Tensor], device: torch.device, max_norm: float, max_value: float | None = None
) -> Tensor:
    """Clip gradients, of which every number is on one process alone, and return the norm of all of them before.

    All processes must call, each with what it has.

    Args:
        pieces: of any shape and on any device, float32; changed in place.
        device: where processes can exchange numbers, and where the norm is.
        max_value: cuts each number to this size instead of shortening all of them to ``max_norm``.
    """
    total = torch.zeros((), device=device)
    for piece in pieces:
        total += piece.square().sum().to(device)
    torch.distributed.all_reduce(total)
    norm = total.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it
    for piece in pieces:
        if max_value is None:
            piece.mul_(scale.to(piece.device))
        else:
            piece.clamp_(-max_value, max_value)
    return norm


def require_divisible(train: TrainConfig, engine: str) -> None:
    """Refuse what looks at weights as a whole.

    Args:
        engine: what it does not work with: "ZeRO", "FSDP2".

    Raises:
        UserError: naming the key and what would do.
    """
    name = train.optimizer.name
    if name not in ELEMENTWISE:
        raise UserError(
            f"train.optimizer.name: {name} does not work with {engine}, which cuts weights into one piece per process: "
            f"it looks at whole matrices, norms or blocks. Take one of {', '.join(ELEMENTWISE)}, or launch with ddp"
        )
    if train.mixed_precision == "fp16":
        raise UserError(f"train.mixed_precision: fp16 does not work with {engine} here; take bf16")


def require_plain(recipe: Recipe, engine: str) -> None:
    """Refuse what has its own place for weights that the engine would deal out, or needs a second set of them.

    Raises:
        UserError: naming the key.
    """
    for key in ("quantize", "block_swap"):
        if getattr(recipe.model, key):
            raise UserError(f"model.{key} does not work with {engine}, which deals the base out; take zero2 or ddp")
    if trains_base(recipe) and isinstance(recipe.prior, ModelPrior):
        raise UserError(
            f"prior.kind: 'model' with whole weights does not work with {engine}, where processes hold the networks in "
            "pieces; take images, or zero2"
        )
