"""Pictures from an exported adapter: the file itself is loaded, by diffusers' own loader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from finetune.config.schema import SamplerConfig
from finetune.errors import UserError
from finetune.export.base import load_base
from finetune.export.read import identify
from finetune.family import ModelFamily
from finetune.sampling import draw


def sample(
    adapter: Path,
    prompts: Sequence[str],
    *,
    base: str | None = None,
    seed: int = 0,
    strength: float = 1.0,
    sampler: SamplerConfig | None = None,
    count: int = 1,
    resolution: int | None = None,
) -> list[Image.Image]:
    """Draw ``count`` pictures of each prompt, in that order.

    On a CPU they are, bit for bit, what ``StableDiffusionPipeline.from_pretrained(base)`` draws after
    ``load_lora_weights(adapter)`` with the same settings and ``finetune.randomness.generator(seed, "sample", i, j)``
    for picture ``j`` of prompt ``i``.

    Args:
        adapter: a LoRA file, a model folder or a run's folder.
        base: as in a recipe's ``model.path``; what the file says where it is not given.
        strength: how much the LoRA counts; 0 is the base, 1 what was trained.
        sampler: steps, guidance, scheduler.
        resolution: side in pixels; the model's own where it is not given.

    Raises:
        UserError: there is no such adapter or base, diffusers cannot load the file, or a strength was asked of a
            whole model.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    family = adapted(adapter, base, strength, device)
    return draw(family, prompts, count, sampler or SamplerConfig(), seed, resolution=resolution)


def adapted(
    adapter: Path, base: str | None = None, strength: float = 1.0, device: torch.device | str = "cpu"
) -> ModelFamily:
    """The base with an exported file loaded into it; arguments and errors as in ``sample``."""
    found = identify(adapter)
    family = load_base(found, base)
    family.device = torch.device(device)
    if found.kind == "lora":
        pipeline = family.pipeline()
        try:
            pipeline.load_lora_weights(str(found.path), adapter_name="sampled")
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            raise UserError(f"{found.path} does not fit {family.source}: {str(error).splitlines()[0]}") from error
        if strength != 1.0:
            pipeline.set_adapters(["sampled"], [strength])
    elif strength != 1.0:
        raise UserError(f"{found.path} is a whole model; strength {strength:g} is for LoRA files")
    return family
