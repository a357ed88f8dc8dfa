"""The forward pass that every recipe shares: one number per sample, in float32, until the recipe reduces."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.adapter import Adapter
from finetune.batch import Batch, Conditioning
from finetune.config.schema import ImagesPrior, ModelPrior, Recipe
from finetune.family import ModelFamily
from finetune.objective import Noised
from finetune.randomness import generator


def training_loss(family: ModelFamily, adapter: Adapter, batch: Batch, recipe: Recipe) -> PriorLoss | Tensor:
    """What most recipes make small: the mean denoising error, and the class preserved as the recipe's prior says.

    ``recipes/dreambooth.py`` spells it out.
    """
    error = denoising_error(family, batch, recipe.seed)
    match recipe.prior:
        case ImagesPrior(layout=layout, weight=weight):
            return (pairwise_loss if layout == "pairwise" else mixed_loss)(error, batch.prior, weight)
        case ModelPrior(weight=weight):
            kept = preservation_error(family, adapter, batch, recipe.seed).mean()
            return PriorLoss(error.mean() + weight * kept, error.mean(), kept)
        case _:
            return error.mean()


def denoising_error(family: ModelFamily, batch: Batch, seed: int) -> Tensor:
    """Weighted squared error of one denoising step, float32 [B].

    Read the prompt, spoil the latents, predict, compare. Averaging is left to the recipe, which knows which samples
    count for what.
    """
    prompt = batch.prompt or family.encode_prompt(batch.captions)
    return replace(batch, prompt=prompt, class_prompt=None).by_size(lambda one: _error(family, one, seed))


def _error(family: ModelFamily, batch: Batch, seed: int) -> Tensor:
    assert batch.prompt is not None
    noised = spoil(family, batch, seed)
    answer = family.predict(noised.noisy, noised.timesteps, batch.prompt, batch.geometry)
    return batch.weight * noised.weight * squared_error(answer, noised.target, batch.mask)


def preservation_error(family: ModelFamily, adapter: Adapter, batch: Batch, seed: int) -> Tensor:
    """How far training has moved what the model makes of the class captions, float32 [B].

    The untouched model's answer is the target, on the same noisy latents: prior preservation without class images.
    The batch must carry ``class_captions``.
    """

    def read() -> Conditioning:
        return batch.class_prompt or family.encode_prompt(batch.class_captions or ())

    with torch.no_grad(), adapter.disabled():
        untouched = read()
    both = replace(batch, prompt=read(), class_prompt=untouched)
    return both.by_size(lambda one: _drift(family, adapter, one, seed))


def _drift(family: ModelFamily, adapter: Adapter, batch: Batch, seed: int) -> Tensor:
    """Of a batch whose ``prompt`` is the class's as it is read now, and ``class_prompt`` as the untouched model did."""
    assert batch.prompt is not None and batch.class_prompt is not None
    noised = spoil(family, batch, seed)
    with torch.no_grad(), adapter.disabled():
        target = family.predict(noised.noisy, noised.timesteps, batch.class_prompt, batch.geometry)
    answer = family.predict(noised.noisy, noised.timesteps, batch.prompt, batch.geometry)
    return batch.weight * noised.weight * squared_error(answer, target, None)


def spoil(family: ModelFamily, batch: Batch, seed: int) -> Noised:
    """Draw latents, noise and timesteps for each sample of a batch of one size and mix them.

    Every sample draws from its own generators, named by its id and draw, so that neither the batch it is in nor the
    process it is on changes what it sees.
    """
    names = list(zip(batch.ids, batch.draws, strict=True))
    shape = batch.posterior.mean.shape[1:]
    device = batch.posterior.mean.device

    def normal(purpose: str) -> Tensor:
        drawn = [torch.randn(shape, generator=generator(seed, purpose, *name)) for name in names]
        return torch.stack(drawn).to(device)

    clean = family.scale(batch.posterior.sample(normal("posterior")))
    timesteps = family.objective.timesteps([generator(seed, "timestep", *name) for name in names]).to(device)
    return family.objective.spoil(clean, normal("noise"), timesteps)


def squared_error(answer: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared error of each sample, float32 [B].

    Args:
        mask: float [B, 1, h, w]; the mean is then ``sum(mask * error) / sum(mask)``, so that a small subject counts
            as much as a large one. A sample whose mask is empty has error 0.
    """
    error = (answer.float() - target.float()).square()
    if mask is None:
        return error.flatten(1).mean(1)
    masked = (error * mask).flatten(1).mean(1)
    return masked / mask.flatten(1).mean(1).clamp(min=1e-6)


class PriorLoss(NamedTuple):
    """The two terms of DreamBooth's loss, scalars."""

    total: Tensor
    instance: Tensor
    prior: Tensor


def pairwise_loss(error: Tensor, prior: Tensor, weight: float) -> PriorLoss:
    """``mean(error of the subject) + weight * mean(error of the class)``: eq. 2 of the DreamBooth paper.

    Args:
        error: float32 [B]. prior: bool [B], True where a sample shows the class. weight: lambda of the paper.
    """
    instance, kept = mean_where(error, ~prior), mean_where(error, prior)
    return PriorLoss(instance + weight * kept, instance, kept)


def mixed_loss(error: Tensor, prior: Tensor, weight: float) -> PriorLoss:
    """``mean(w * error)`` with w = ``weight`` for class images: they are ordinary samples, as in kohya's trainers.

    On a balanced batch it is half of ``pairwise_loss``.
    """
    scaled = torch.where(prior, weight * error, error)
    return PriorLoss(scaled.mean(), mean_where(error, ~prior), mean_where(error, prior))


def mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Mean of ``values`` [B] over the True entries of ``where`` [B]; 0 where there are none."""
    return torch.where(where, values, 0).sum() / where.sum().clamp(min=1)
