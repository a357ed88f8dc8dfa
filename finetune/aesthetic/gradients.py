"""The method itself: the mean of pictures, a copy of the encoder that takes a few steps towards it, and the mixture."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Aesthetic:
    """What pictures have in common, and how strongly prompts are drawn towards it.

    Attributes:
        embedding: float32 [1, d], mean of the pictures' vectors.
        projection: float32 [d, width], from the text encoder's state at the end of a text to the same space.
        steps: of Adam, for each prompt; none leaves the encoder as it is.
        learning_rate: of these steps.
        weight: share of the adapted encoding, 0 to 1.
        mix: ``lerp`` on the straight line between the two encodings, ``slerp`` on the arc, token by token.
    """

    embedding: Tensor
    projection: Tensor
    steps: int = 10
    learning_rate: float = 1e-4
    weight: float = 0.9
    mix: Literal["lerp", "slerp"] = "lerp"


def mean_embedding(vectors: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """The mean [1, d] of vectors [N, d] that keep their lengths, float32.

    Args:
        weights: how much each counts; all the same where they are not given.
    """
    shares = vectors.new_ones(len(vectors)) if weights is None else torch.tensor(weights)
    shares = shares.double().to(vectors.device)
    return ((shares / shares.sum()) @ vectors.double()).float()[None]


def alignment(encoder: nn.Module, ids: Tensor, end: int, aesthetic: Aesthetic) -> Tensor:
    """Cosine of each text's vector and the embedding, float32 [B].

    The text's state is taken at its first end token, not at the largest id as transformers does for old settings:
    words that textual inversion has added have larger ids than the end.

    Args:
        encoder: a CLIP text encoder.
        ids: padded token ids [B, L].
        end: id of the end token.
    """
    answer: Any = encoder(ids)
    states = answer.last_hidden_state.float()
    ends = (ids == end).int().argmax(-1)
    read = states[torch.arange(len(ids), device=ids.device), ends] @ aesthetic.projection.to(states).T
    return F.cosine_similarity(read, aesthetic.embedding.to(states))


def adapt(encoder: nn.Module, ids: Tensor, end: int, aesthetic: Aesthetic) -> nn.Module:
    """A copy of ``encoder`` in float32, after ``steps`` steps of Adam that bring texts towards the embedding.

    The loss is the negative mean of ``alignment``. The projection is no part of the encoder and stays as it is; so
    does ``encoder``, whatever trains around it.

    Args:
        encoder: a CLIP text encoder on the device of ``ids``.
        ids, end: as in ``alignment``; several texts share the copy.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(ids.device.type, enabled=False):
        ids = ids.clone()  # one that was made in inference mode can take no part in gradients
        moved = copy.deepcopy(encoder).float().eval().requires_grad_(True)
        optimizer = torch.optim.Adam(moved.parameters(), aesthetic.learning_rate)
        for _ in range(aesthetic.steps):
            optimizer.zero_grad()
            (-alignment(moved, ids, end, aesthetic).mean()).backward()
            optimizer.step()
    return moved.requires_grad_(False)


def blend(plain: Tensor, moved: Tensor, aesthetic: Aesthetic) -> Tensor:
    """Two encodings [..., width] mixed, ``weight`` of it ``moved``; at 0 and 1 one of them, bit for bit."""
    share = aesthetic.weight
    if aesthetic.mix == "lerp" or share in (0.0, 1.0):
        return torch.lerp(plain, moved, share)
    angle = F.cosine_similarity(plain, moved, dim=-1).clamp(-1, 1).arccos()[..., None]
    arc = (plain * ((1 - share) * angle).sin() + moved * (share * angle).sin()) / angle.sin()
    return torch.where(angle.sin() < 1e-3, torch.lerp(plain, moved, share), arc)  # nearly one direction
