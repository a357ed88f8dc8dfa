"""Low-rank layers as one, where readers have one layer for several of diffusers': without loss, and back.

Beside each other in one layer, ``B_q A_q``, ``B_k A_k`` and ``B_v A_v`` are ``diag(B_q, B_k, B_v) [A_q; A_k; A_v]``, of
a rank that is the sum of theirs. Outputs of layers that are not there are zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from finetune.originals import Place
from finetune.originals.tensors import rows, stack, swap


def diagonal(places: Sequence[Place], parts: Sequence[Tensor]) -> Tensor:
    """Parts [out, r, ...] as blocks: each with its own outputs and its own ranks."""
    ranks = [part.shape[1] for part in parts]
    wide, before = [], 0
    for part, rank in zip(parts, ranks, strict=True):
        row = part.new_zeros(part.shape[0], sum(ranks), *part.shape[2:])
        row[:, before : before + rank] = part
        wide.append(row)
        before += rank
    return stack(places, wide)


def taken_apart(places: Mapping[str, Place], whole: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The outputs of each layer of a whole [out, r, ...], and the ranks that they use: indices into r.

    Where the ranks fall into equal blocks, one for each layer, these are its own, so that what ``diagonal`` made of
    layers of one rank comes back as it was. Otherwise they are those with a number other than zero.
    """
    height, ranks = whole.shape[:2]
    apart = {name: swap(place, whole[rows(place, height)]) for name, place in places.items()}
    if len(places) == 1:
        return {name: (part, torch.arange(ranks)) for name, part in apart.items()}
    used = {name: part.movedim(1, 0).flatten(1).ne(0).any(dim=1) for name, part in apart.items()}
    blocks = torch.arange(ranks).tensor_split(len(places)) if ranks % len(places) == 0 else ()
    own = dict(zip(places, blocks, strict=False))
    if own and all(int(used[name].sum()) == int(used[name][block].sum()) for name, block in own.items()):
        return {name: (part, own[name]) for name, part in apart.items()}
    return {name: (part, used[name].nonzero().flatten()) for name, part in apart.items()}
