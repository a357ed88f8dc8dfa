"""The change that an aesthetic embedding makes to a text encoder, kept as an ordinary LoRA."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.adapter import Weights
from finetune.aesthetic.gradients import Aesthetic, adapt, alignment


@dataclass(frozen=True)
class Baked:
    """A LoRA of the text encoder and what it keeps of the change that it was made from.

    Attributes:
        weights: of kind "lora", of every linear layer.
        kept: share of the squared change of the linear layers that is left at the LoRA's rank.
        linear: share of the squared change of all parameters that lies in linear layers, which alone a LoRA can hold.
        before, moved, after: mean cosine of the prompts and the embedding, untouched, with the whole change, and with
            the LoRA.
    """

    weights: Weights
    kept: float
    linear: float
    before: float
    moved: float
    after: float

    def __str__(self) -> str:
        return (
            f"baked: cosine of the prompts and the embedding {self.before:.3f} -> {self.after:.3f} with the LoRA, "
            f"{self.moved:.3f} with the whole change, of which {self.linear:.0%} lies in linear layers and "
            f"{self.kept:.0%} of that is left at this rank"
        )


def bake(encoder: nn.Module, ids: Tensor, end: int, aesthetic: Aesthetic, rank: int, network: str) -> Baked:
    """Adapt a copy of ``encoder`` to all texts together and factorise the change of its linear layers.

    The best change of a given rank in the sense of squares is the truncated singular value decomposition (Eckart &
    Young 1936); both factors get the root of the singular values.

    Args:
        ids, end: as in ``alignment``.
        rank: of the LoRA; less where a layer is smaller.
        network: the encoder's name in ``ModelFamily.networks``.
    """
    moved = adapt(encoder, ids, end, aesthetic)
    changes = {
        name: (after.detach() - before.detach()).cpu()
        for (name, after), before in zip(moved.named_parameters(), encoder.parameters(), strict=True)
    }
    tensors: dict[str, Tensor] = {}
    low = copy.deepcopy(encoder)
    whole = kept = 0.0
    for name, module in low.named_modules():
        if isinstance(module, nn.Linear):
            change = changes[f"{name}.weight"]
            down, up = factors(change, rank)
            tensors[f"{network}.{name}.lora_A.weight"] = down
            tensors[f"{network}.{name}.lora_B.weight"] = up
            tensors[f"{network}.{name}.alpha"] = torch.tensor(float(len(down)))
            module.weight.data += (up @ down).to(module.weight)
            whole += float(change.square().sum())
            kept += float((up @ down).square().sum())
    every = sum(float(change.square().sum()) for change in changes.values())
    settings = {"kind": "lora", "rank": str(rank), "alpha": str(rank), "made_by": "aesthetic gradients"}
    with torch.no_grad():
        cosines = [float(alignment(one, ids, end, aesthetic).mean()) for one in (encoder, moved, low)]
    return Baked(
        Weights("lora", tensors, settings),
        kept / (whole or 1.0),
        whole / (every or 1.0),
        cosines[0],
        cosines[1],
        cosines[2],
    )


def factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``down`` [r, in] and ``up`` [out, r] whose product is nearest to a matrix [out, in] among those of rank r."""
    left, sizes, right = torch.linalg.svd(change.double(), full_matrices=False)
    roots = sizes[:rank].sqrt()
    return (roots[:, None] * right[:rank]).float(), (left[:, :rank] * roots).float()
