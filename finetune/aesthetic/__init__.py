"""Aesthetic gradients (Gallego 2022, https://arxiv.org/abs/2209.12330): no weights are trained.

space = shared_space(family, clip)                          where texts and pictures can be compared
aesthetic = Aesthetic(mean_embedding(space.embed(pictures)), space.projection)
adapt(encoder, ids, end, aesthetic)                         a copy of the text encoder, moved towards it for some texts
with attach(pipeline, aesthetic): pipeline("a red star")    a copy for each prompt, then forgotten
bake(encoder, ids, end, aesthetic, rank, network)           the same change for good, as an ordinary LoRA
"""

from __future__ import annotations

from finetune.aesthetic.baking import Baked, bake
from finetune.aesthetic.gradients import Aesthetic, adapt, alignment, blend, mean_embedding
from finetune.aesthetic.prompts import Attached, attach
from finetune.aesthetic.space import require_space, shared_space

__all__ = [
    "Aesthetic",
    "Attached",
    "Baked",
    "adapt",
    "alignment",
    "attach",
    "bake",
    "blend",
    "mean_embedding",
    "require_space",
    "shared_space",
]
