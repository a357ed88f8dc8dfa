"""Pictures from an exported adapter: the file itself is loaded, by diffusers' own loader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from finetune.config.schema import ModelConfig, SamplerConfig
from finetune.export.base import load_base
from finetune.export.kinds import kind
from finetune.export.read import pieces
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
    prompt_chunks: int | None = None,
    held: ModelConfig | None = None,
) -> list[Image.Image]:
    """Draw ``count`` pictures of each prompt, in that order.

    On a CPU they are, bit for bit, what ``StableDiffusionPipeline.from_pretrained(base)`` draws after
    ``load_lora_weights(adapter)`` with the same settings and ``finetune.randomness.generator(seed, "sample", i, j)``
    for picture ``j`` of prompt ``i``; a prompt of several chunks, which diffusers would cut, as A1111 reads it.

    Args:
        adapter: a LoRA file, a model folder or a run's folder.
        base: as in a recipe's ``model.path``; what the file says where it is not given.
        strength: how much the LoRA counts; 0 is the base, 1 what was trained.
        sampler: steps, guidance, scheduler.
        resolution: side in pixels; the model's own where it is not given.
        prompt_chunks: as in a recipe's ``model``; what the file says where it is not given.
        held: a recipe's ``model``, where the base shall lie in memory as it does there; else all of it is float32.

    Raises:
        UserError: there is no such adapter or base, diffusers cannot load the file, or a strength was asked of a
            whole model.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    family = adapted(adapter, base, strength, device, prompt_chunks, held)
    return draw(family, prompts, count, sampler or SamplerConfig(), seed, resolution=resolution)


def adapted(
    adapter: Path,
    base: str | None = None,
    strength: float = 1.0,
    device: torch.device | str = "cpu",
    prompt_chunks: int | None = None,
    held: ModelConfig | None = None,
) -> ModelFamily:
    """The base with an exported file, or all that a run exported, loaded; arguments and errors as in ``sample``.

    What is added to the weights themselves, as differences are, needs them whole: ``held.quantize`` is then left out.
    """
    found = pieces(adapter)
    if held and any(
        piece.layout == "difference" or (piece.kind, piece.layout) == ("lycoris", "kohya") for piece in found
    ):
        held = held.model_copy(update={"quantize": None})
    family = load_base(found[0], base, prompt_chunks, held)
    family.device = torch.device(device)
    pipeline = family.pipeline()
    for piece in found:
        beside = piece.kind == "embedding" and len({one.kind for one in found}) > 1  # words are used or not
        kind(piece.kind).apply(pipeline, piece, 1.0 if beside else strength)
    family.networks.to(family.device)  # what was added lies beside the weights, which may be swapped
    # what a file changes of the pipeline itself, and not of its networks, has to stay
    family.pipeline = lambda: pipeline  # type: ignore[method-assign]
    return family
