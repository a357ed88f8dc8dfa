"""Pictures from a family's networks as they are: previews, grids, class images and ``finetune sample`` draw alike."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import nn

from finetune.config.schema import SamplerConfig
from finetune.distributed import Processes
from finetune.errors import UserError, nearest
from finetune.family import ModelFamily
from finetune.randomness import generator


def draw(
    family: ModelFamily,
    prompts: Sequence[str],
    per_prompt: int,
    sampler: SamplerConfig,
    seed: int,
    processes: Processes | None = None,
    resolution: int | None = None,
    negative: str = "",
) -> list[Image.Image]:
    """Draw ``per_prompt`` pictures of each prompt, in that order, on every process.

    A picture depends on the weights, the settings, its prompt, ``seed``, the prompt's place and its own number, and
    on nothing else: pictures are drawn one by one, so that neither their number nor the processes they are divided
    among changes a bit. Weights, modes, the global random state and which networks are in memory are afterwards as
    they were.

    Args:
        resolution: side in pixels; the model's own where it is not set.
        negative: what guidance leads away from.

    Raises:
        UserError: ``sampler.scheduler`` is no scheduler of diffusers that fits the model, or there is no guidance away
            from a negative prompt.
    """
    rank, world = (processes.rank, processes.world) if processes else (0, 1)
    wanted = [(prompt, number, copy) for number, prompt in enumerate(prompts) for copy in range(per_prompt)]
    with inference(family) as pipeline:
        if sampler.scheduler:
            pipeline.scheduler = change_scheduler(pipeline.scheduler, sampler.scheduler)
        settings = arguments(family, pipeline, sampler) | away_from(negative, family, pipeline, sampler)
        mine = {}
        for index in range(rank, len(wanted), world):
            if processes:
                processes.doing(f"drawing picture {index + 1} of {len(wanted)}")
            prompt, number, copy = wanted[index]
            mine[index] = one(pipeline, prompt, settings, generator(seed, "sample", number, copy), resolution)
    parts = processes.gather_object(mine) if processes else [mine]
    drawn = {index: picture for part in parts for index, picture in part.items()}
    return [drawn[index] for index in range(len(wanted))]


def one(
    pipeline: Any, prompt: str, settings: Mapping[str, Any], rng: torch.Generator, resolution: int | None = None
) -> Image.Image:
    """One picture, drawn by diffusers' own pipeline; ``settings`` as of ``arguments``."""
    size = {} if resolution is None else {"height": resolution, "width": resolution}  # not all know what None is
    picture: Image.Image = pipeline(prompt=prompt, **settings, generator=rng, **size).images[0]
    return picture


def arguments(family: ModelFamily, pipeline: Any, sampler: SamplerConfig, prompts: int = 1) -> dict[str, Any]:
    """The settings as the pipeline of ``family`` calls them, for so many prompts.

    Raises:
        UserError: it has no ``guidance_rescale``, and one is asked for.
    """
    rescale = {"guidance_rescale": sampler.guidance_rescale} if sampler.guidance_rescale else {}
    if rescale and "guidance_rescale" not in inspect.signature(pipeline.__call__).parameters:
        raise UserError(f"guidance_rescale: {type(pipeline).__name__} has none; leave it at 0")
    return {"num_inference_steps": sampler.steps, **family.guided(sampler.guidance, prompts), **rescale}


def away_from(negative: str, family: ModelFamily, pipeline: Any, sampler: SamplerConfig) -> dict[str, Any]:
    """A negative prompt as the pipeline of ``family`` calls it; nothing for an empty one.

    Raises:
        UserError: it would change nothing, because the pipeline knows none or does not guide.
    """
    if not negative:
        return {}
    known, told = inspect.signature(pipeline.__call__).parameters, family.guided(sampler.guidance)
    if "negative_prompt" not in known or ("true_cfg_scale" in known and "true_cfg_scale" not in told):
        raise UserError(f"negative prompt: {type(pipeline).__name__} is not guided away from anything; leave it empty")
    if sampler.guidance <= 1:
        raise UserError(f"negative prompt: needs guidance above 1, not {sampler.guidance:g}")
    return {"negative_prompt": negative}


@contextmanager
def untouched(family: ModelFamily) -> Iterator[None]:
    """Draw as the model does before it is trained: with its own scheduler, whatever the objective will change."""
    changed, family.sampling = family.sampling, {}
    try:
        yield
    finally:
        family.sampling = changed


@contextmanager
def inference(family: ModelFamily) -> Iterator[Any]:
    """A quiet pipeline of ``family``: no gradients, no dropout; all of it as before when it closes."""
    before = set(family.networks)
    modes = {module: module.training for module in family.networks.modules()}
    pipeline: Any = family.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    scheduler = pipeline.scheduler
    family.networks.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            yield pipeline
    finally:
        pipeline.scheduler = scheduler
        _restore(family, modes, before)


def change_scheduler(scheduler: Any, name: str) -> Any:
    """A scheduler of diffusers' class ``name`` with the settings of ``scheduler``.

    ``from_config`` drops settings that stood at the old class's default, and the new class may have another:
    ``clip_sample`` would come back on and ruin latents. So settings are all passed by name, and clipping is off.

    Raises:
        UserError: there is no such class, or it does not fit, or cannot sample where no signal is left.
    """
    known = {kind.__name__: kind for kind in scheduler.compatibles}
    if name not in known:
        raise UserError(f"scheduler: {name!r} does not fit this model{nearest(name, known)}")
    own = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    if own.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in inspect.signature(known[name]).parameters:
        raise UserError(f"scheduler: {name} has no zero terminal SNR, which this model was trained with; DDIMScheduler")
    return known[name].from_config(own | {"clip_sample": False, "thresholding": False})


def _restore(family: ModelFamily, modes: dict[nn.Module, bool], before: set[str]) -> None:
    for module, training in modes.items():
        module.training = training
    family.release(*(set(family.networks) - before))
