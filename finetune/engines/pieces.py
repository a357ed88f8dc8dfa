"""What the engines have in common that give each process a piece of every weight."""

from __future__ import annotations

from finetune.config.schema import TrainConfig
from finetune.errors import UserError

ELEMENTWISE = ("adamw", "lion", "sgd")
"""Optimizers that treat every number for itself, and so do not mind where a weight is cut."""


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
