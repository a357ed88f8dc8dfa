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
from finetune.objective import Draws, Noised


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
    """Weighted error of one denoising step, float32 [B].

    Read the prompt, spoil the latents, predict, compare. Averaging is left to the recipe, which knows which samples
    count for what.
    """
    prompt = batch.prompt or family.encode_prompt(batch.captions)
    return replace(batch, prompt=prompt, class_prompt=None).by_size(lambda one: _error(family, one, seed))


def _error(family: ModelFamily, batch: Batch, seed: int) -> Tensor:
    assert batch.prompt is not None
    noised = spoil(family, batch, seed)
    answer = family.predict(noised.noisy, noised.timesteps, batch.prompt, batch.geometry)
    return batch.weight * noised.weight * masked_mean(family.objective.error(answer, noised), batch.mask)


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
        untouched = family.predict(noised.noisy, noised.timesteps, batch.class_prompt, batch.geometry)
        target = family.objective.restate(untouched, noised)
    answer = family.predict(noised.noisy, noised.timesteps, batch.prompt, batch.geometry)
    error = family.objective.error(answer, noised._replace(target=target))
    return batch.weight * noised.weight * masked_mean(error, None)


def spoil(family: ModelFamily, batch: Batch, seed: int) -> Noised:
    """Draw latents, noise and timesteps for each sample of a batch of one size and mix them.

    Every sample draws from its own generators, named by its id and draw, so that neither the batch it is in nor the
    process it is on changes what it sees.
    """
    draws = Draws(seed, batch.ids, batch.draws)
    mean = batch.posterior.mean
    clean = family.scale(batch.posterior.sample(draws.normal("posterior", mean.shape[1:]).to(mean.device)))
    return family.objective.spoil(clean, draws, batch.timestep_bias)


def masked_mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """Mean error of each sample, float32 [B].

    Args:
        error: of every number, float32 [B, C, h, w].
        mask: float [B, 1, h, w]; the mean is then ``sum(mask * error) / sum(mask)``, so that a small subject counts
            as much as a large one. A sample whose mask is empty has error 0.
    """
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
