"""From a base's process and a recipe's ``objective`` section to the objective of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from finetune.config import objective as sections
from finetune.config.objective import ObjectiveConfig
from finetune.errors import UserError
from finetune.objective import Noised, Prediction
from finetune.objectives import losses, predictions, weights, zero_snr
from finetune.objectives.ddpm import DDPM
from finetune.objectives.denoising import Denoising, unchanged
from finetune.objectives.edm import EDM
from finetune.objectives.flow import Flow
from finetune.objectives.noise import Noising, Pyramid
from finetune.objectives.process import Process
from finetune.objectives.shifts import Dynamic, Shift, static, unshifted
from finetune.objectives.times import Quantiles, Times, independent, logit_normal, mode, stratified, uniform

_NAMES: dict[type[Process], str] = {DDPM: "discrete-time diffusion", Flow: "flow matching", EDM: "EDM"}


def refined(process: Process, config: ObjectiveConfig) -> Denoising:
    """The objective that ``config`` makes of what a base was trained on.

    Raises:
        UserError: ``config`` asks for what has no meaning for this kind of process, or for times it does not have.
    """
    if found := list(_strangers(process, config)):
        name = _NAMES[type(process)]
        raise UserError("\n".join(f"objective.{key}: {reason}; this model is one of {name}" for key, reason in found))
    trained = _trained(process, config)
    return Denoising(
        process=trained,
        times=_times(trained, config.timesteps),
        noise=_noise(config.noise),
        weigh=_weighting(trained, config.weighting),
        loss=_loss(trained, config.loss),
        sampling=_sampling(process, trained, config),
        restate=_restating(process, trained),
    )


def _strangers(process: Process, config: ObjectiveConfig) -> Iterator[tuple[str, str]]:
    """Keys that mean nothing to a process, and why."""
    weighting = config.weighting
    if not isinstance(process, DDPM):
        if config.prediction is not None:
            yield "prediction", "is for discrete-time diffusion, where one base can learn to answer otherwise"
        if config.zero_terminal_snr:
            yield "zero_terminal_snr", "rescales the table of discrete-time diffusion"
        if isinstance(weighting, sections.SnrWeighting):
            yield "weighting.kind", f"{weighting.kind} is a weight by the signal-to-noise ratio of diffusion's table"
        if getattr(config.loss, "schedule", None) == "snr":
            yield "loss.schedule", "snr is the signal-to-noise ratio of diffusion's table; constant or exponential"
    if not isinstance(process, Flow):
        if config.timesteps.shift is not None:
            yield "timesteps.shift", "is for flow matching"
        if isinstance(weighting, sections.SigmaWeighting):
            yield "weighting.kind", f"{weighting.kind} is a weight by flow matching's sigma"
    if isinstance(process, EDM) and config.loss.kind != "l2":
        yield "loss.kind", "must be l2, which EDM's preconditioning was made for"


def _trained(process: Process, config: ObjectiveConfig) -> Process:
    if not isinstance(process, DDPM):
        return process
    prediction = config.prediction or process.prediction
    if not config.zero_terminal_snr:
        return DDPM(process.alphas_cumprod, prediction)
    if prediction == "epsilon":
        raise UserError(
            "objective.zero_terminal_snr: the model predicts epsilon, which says nothing about the picture where no "
            "signal is left; set objective.prediction to v_prediction, and train enough for the model to learn it"
        )
    return DDPM(zero_snr.rescaled(process.alphas_cumprod), prediction)


def _times(process: Process, config: sections.TimestepsConfig) -> Times:
    low, high = (_share(process, key, getattr(config, key)) for key in ("min", "max"))
    if low >= high:
        raise UserError(f"objective.timesteps.min: must be less than max; {config.min} is not less than {config.max}")
    draw = stratified if config.draws == "stratified" else independent
    return Times(_curve(process, config), low, high, _shift(process, config), draw)


def _share(process: Process, key: str, bound: float) -> float:
    """A bound that is a share, or a timestep."""
    if bound <= 1:
        return bound
    if bound > process.steps:
        raise UserError(f"objective.timesteps.{key}: must be at most {process.steps}, the model's steps, not {bound}")
    return bound / process.steps


def _curve(process: Process, config: sections.TimestepsConfig) -> Quantiles:
    match config.distribution:
        case sections.LogitNormalConfig(mean=mean, std=std):
            return partial(logit_normal, mean=mean, std=std)
        case sections.ModeConfig(scale=scale):
            return partial(mode, scale=scale)
        case sections.UniformConfig():
            return uniform
    # as the papers trained: Esser et al. 2024, section 5.1; Karras et al. 2022, table 1
    if isinstance(process, Flow):
        return partial(logit_normal, mean=0.0, std=1.0)
    return partial(logit_normal, mean=-1.2, std=1.2) if isinstance(process, EDM) else uniform


def _shift(process: Process, config: sections.TimestepsConfig) -> Shift:
    if not isinstance(process, Flow):
        return unshifted
    match config.shift:
        case sections.StaticShiftConfig(factor=factor):
            return partial(static, factor=factor)
        case sections.DynamicShiftConfig() as shift:
            return Dynamic(**shift.model_dump(exclude={"kind"}), patch=process.patch)
        case sections.ModelShiftConfig():
            return process.shift
    return unshifted


def _noise(config: sections.NoiseConfig) -> Noising:
    pyramid = Pyramid(config.pyramid.discount, config.pyramid.levels) if config.pyramid else None
    return Noising(pyramid, config.offset, config.offset_probability, config.perturbation)


def _weighting(process: Process, config: sections.WeightingConfig) -> weights.Weighting:
    if isinstance(process, DDPM) and isinstance(config, sections.SnrWeighting):
        return weights.BySnr(process, _snr_curve(config), config.least)
    if isinstance(process, Flow) and isinstance(config, sections.SigmaWeighting):
        return weights.BySigma(process, getattr(weights, config.kind))
    return weights.even


def _snr_curve(config: sections.SnrWeighting) -> Callable[[Tensor], Tensor]:
    """The function of ``finetune.objectives.weights`` that is called as the kind is, with the section's own keys."""
    return partial(getattr(weights, config.kind), **config.model_dump(exclude={"kind", "least"}))


def _loss(process: Process, config: sections.LossConfig) -> losses.Loss:
    if not isinstance(config, sections.TurningLoss):
        return losses.l1 if config.kind == "l1" else losses.l2
    return losses.Turning(getattr(losses, config.kind), _turn(process, config))


def _turn(process: Process, config: sections.TurningLoss) -> losses.Turn:
    if config.schedule == "snr" and isinstance(process, DDPM):
        return partial(losses.by_snr, process=process, delta=config.delta)
    if config.schedule == "exponential":
        return partial(losses.exponential, process=process, delta=config.delta)
    return partial(losses.constant, delta=config.delta)


def _sampling(process: Process, trained: Process, config: ObjectiveConfig) -> dict[str, object]:
    changed = {"prediction_type": trained.prediction} if trained.prediction != process.prediction else {}
    return {**changed, **(zero_snr.SAMPLING if config.zero_terminal_snr else {})}


def _restating(process: Process, trained: Process) -> Callable[[Tensor, Noised], Tensor]:
    if not isinstance(trained, DDPM) or trained.prediction == process.prediction:
        return unchanged

    def restate(answer: Tensor, noised: Noised, given: Prediction = process.prediction) -> Tensor:
        parts = trained.parts(answer, noised.timesteps)
        return predictions.converted(answer, given, trained.prediction, noised.noisy, *parts)

    return restate
