"""What a recipe says of how latents are spoiled and what errors cost, and what in it cannot be meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from finetune.config.section import Fraction, Section

if TYPE_CHECKING:
    from finetune.config.schema import Recipe

Found = tuple[tuple[str | int, ...], str]
"""A key, and the rest of a sentence that begins with it."""

Bound = Fraction | Annotated[int, Field(ge=2)]
"""A share of the way to noise, or a timestep."""


class UniformConfig(Section):
    """Every time equally often."""

    kind: Literal["uniform"]


class LogitNormalConfig(Section):
    """`sigmoid(mean + std n)`, n being standard normal: mostly the middle."""

    kind: Literal["logit_normal"]
    mean: float = 0.0
    """Positive for more noise; the opposite sign of diffusers' `logit_mean`."""
    std: PositiveFloat = 1.0
    """How far times spread: below 1 nearer to the middle."""


class ModeConfig(Section):
    """The middle for a positive scale, the ends for a negative one."""

    kind: Literal["mode"]
    scale: Annotated[float, Field(ge=-1.0, le=1.75)] = 1.29
    """How much they do."""


class StaticShiftConfig(Section):
    """Every time moved towards noise: the middle to `factor / (factor + 1)`."""

    kind: Literal["static"]
    factor: PositiveFloat = 3.0
    """Above 1 for more noise."""


class DynamicShiftConfig(Section):
    """As `static`, with a factor e^mu that grows with the picture: mu is a line through two numbers of image tokens."""

    kind: Literal["dynamic"]
    base_shift: float = 0.5
    """mu at `base_image_seq_len`."""
    max_shift: float = 1.15
    """mu at `max_image_seq_len`."""
    base_image_seq_len: PositiveInt = 256
    """Image tokens of a small picture."""
    max_image_seq_len: PositiveInt = 4096
    """Image tokens of a large one."""


class ModelShiftConfig(Section):
    """As the model's own scheduler does it."""

    kind: Literal["model"]


class TimestepsConfig(Section):
    """Which times are trained, and how often. A time is a share of the way from picture (0) to noise (1)."""

    distribution: Annotated[UniformConfig | LogitNormalConfig | ModeConfig, Field(discriminator="kind")] | None = None
    """How often each is drawn; `uniform` for discrete-time diffusion, `logit_normal` for flow matching and, with mean
    -1.2 and std 1.2, for EDM where it is not set."""
    min: Bound = 0.0
    """No time is nearer to the picture: a share, or a timestep from 2 up. The distribution is cut, not squeezed."""
    max: Bound = 1.0
    """No time is nearer to noise; a timestep is not itself part of the range."""
    bias: float = 0.0
    """Positive for more noise (composition), negative for less (texture): the noisiest of 1 + bias draws, or the least
    noisy of 1 - bias. A concept's own `timestep_bias` takes its place."""
    shift: Annotated[StaticShiftConfig | DynamicShiftConfig | ModelShiftConfig, Field(discriminator="kind")] | None = (
        None
    )
    """Towards noise, for flow matching; none where it is not set."""
    draws: Literal["independent", "stratified"] = "independent"
    """`stratified` spreads the times of draws that follow each other evenly: less noise in the loss."""


class PyramidConfig(Section):
    """Coarser noise beside the fine: Whitaker 2023."""

    discount: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    """Each coarser level counts so many times the one before."""
    levels: PositiveInt = 6
    """At most; no level is coarser than one cell."""


class NoiseConfig(Section):
    """What latents are spoiled with; plain Gaussian noise unless something is set."""

    offset: NonNegativeFloat = 0.0
    """Adds so many times one number per channel, for darker and brighter pictures: 0.1 (Guttenberg 2023)."""
    offset_probability: Fraction = 1.0
    """Share of draws that have an offset."""
    perturbation: NonNegativeFloat = 0.0
    """Adds so many times fresh noise to what the model sees and not to what it is asked: 0.1 (Ning et al. 2023)."""
    pyramid: PyramidConfig | None = None
    """Adds noise of lower resolutions."""


class NoWeighting(Section):
    """Every time counts alike."""

    kind: Literal["none"]


class SnrWeighting(Section):
    """Weights by the signal-to-noise ratio, the same for one mistake whatever is predicted."""

    kind: str
    least: Fraction = 0.0
    """No time counts less; more than 0 keeps the last one learning with `zero_terminal_snr`."""


class LikeEpsilonWeighting(SnrWeighting):
    """Whatever is predicted, times count as they do for epsilon."""

    kind: Literal["like_epsilon"]


class MinSnrWeighting(SnrWeighting):
    """`min(SNR, gamma)` on the error of the picture: Hang et al. 2023."""

    kind: Literal["min_snr"]
    gamma: PositiveFloat = 5.0
    """The largest weight."""


class SoftMinSnrWeighting(SnrWeighting):
    """`SNR gamma / (SNR + gamma)` on the error of the picture: min-SNR without its corner."""

    kind: Literal["soft_min_snr"]
    gamma: PositiveFloat = 5.0
    """What the weight comes near where the SNR is large."""


class DebiasedWeighting(SnrWeighting):
    """`1 / sqrt(SNR)` on the error of epsilon: Yu et al. 2023."""

    kind: Literal["debiased"]


class P2Weighting(SnrWeighting):
    """`1 / (k + SNR)^gamma` on the error of epsilon: Choi et al. 2022."""

    kind: Literal["p2"]
    gamma: NonNegativeFloat = 1.0
    """How steeply pictures with little noise lose weight; 0 is no weighting."""
    k: PositiveFloat = 1.0
    """Keeps the weight finite where the SNR is near 0."""


class SigmaWeighting(Section):
    """Weights by flow matching's sigma."""

    kind: str


class SigmaSqrtWeighting(SigmaWeighting):
    """`sigma^-2`; very large near the picture, so set `timesteps.min` with it."""

    kind: Literal["sigma_sqrt"]


class SigmaSquaredWeighting(SigmaWeighting):
    """`sigma^2`: the error of the picture in place of the velocity's."""

    kind: Literal["sigma_squared"]


class CosmapWeighting(SigmaWeighting):
    """`2 / (pi (1 - 2 sigma + 2 sigma^2))`."""

    kind: Literal["cosmap"]


WeightingConfig = Annotated[
    NoWeighting
    | MinSnrWeighting
    | SoftMinSnrWeighting
    | DebiasedWeighting
    | P2Weighting
    | LikeEpsilonWeighting
    | CosmapWeighting
    | SigmaSqrtWeighting
    | SigmaSquaredWeighting,
    Field(discriminator="kind"),
]


class L2Loss(Section):
    """The square of the difference."""

    kind: Literal["l2"]


class L1Loss(Section):
    """Its absolute value."""

    kind: Literal["l1"]


class TurningLoss(Section):
    """A parabola near zero and a line beyond `delta`, so that outliers count less."""

    kind: str
    delta: PositiveFloat = 0.1
    """Where it turns."""
    schedule: Literal["constant", "exponential", "snr"] = "constant"
    """How the turn moves with time: from 1 near the picture to delta near noise, or not at all."""


class HuberLoss(TurningLoss):
    """`d^2` up to delta, `2 delta |d| - delta^2` beyond."""

    kind: Literal["huber"]


class PseudoHuberLoss(TurningLoss):
    """`2 delta (sqrt(d^2 + delta^2) - delta)`; kohya's `huber`."""

    kind: Literal["pseudo_huber"]


class SmoothL1Loss(TurningLoss):
    """`2 (sqrt(d^2 + delta^2) - delta)`; kohya's `smooth_l1`."""

    kind: Literal["smooth_l1"]


LossConfig = Annotated[L2Loss | L1Loss | HuberLoss | PseudoHuberLoss | SmoothL1Loss, Field(discriminator="kind")]


class ObjectiveConfig(Section):
    """How latents are spoiled, what is asked back, what errors cost; as the base was trained where nothing is set."""

    prediction: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the model shall learn to answer; the model's own where it is not set. Another one takes long to learn."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that nothing is left of the picture in the last timestep (Lin et al. 2023)."""
    guidance: NonNegativeFloat | None = None
    """What a guidance-distilled denoiser (FLUX.1 dev) is told while it trains; 1 where it is not set."""
    timesteps: TimestepsConfig = TimestepsConfig()
    noise: NoiseConfig = NoiseConfig()
    weighting: WeightingConfig = NoWeighting(kind="none")
    loss: LossConfig = L2Loss(kind="l2")


AT = ("objective",)
CHANGES_WEIGHTS = ("lora", "lokr", "loha", "oft", "full", "pivotal")  # kinds that can learn another prediction


def contradictions(recipe: Recipe) -> Iterator[Found]:
    """Everything about the objective that cannot be meant, whatever the model."""
    if recipe.recipe == "aesthetic":
        yield from _untrained(recipe)
        return
    yield from _times(recipe.objective.timesteps)
    yield from _terminal(recipe)
    yield from _kinds(recipe.objective)
    if recipe.objective.noise.offset_probability < 1 and not recipe.objective.noise.offset:
        yield (*AT, "noise", "offset_probability"), "is set, but offset is 0"


def _untrained(recipe: Recipe) -> Iterator[Found]:
    text = "has no part in an aesthetic embedding, which trains no weights"
    if recipe.objective != ObjectiveConfig():
        yield AT, text
    for index, concept in enumerate(recipe.data.concepts):
        if concept.timestep_bias is not None:
            yield ("data", "concepts", index, "timestep_bias"), text


def _times(times: TimestepsConfig) -> Iterator[Found]:
    alike = (times.min > 1) == (times.max > 1)  # else it depends on how many steps the model has
    if alike and times.min >= times.max:
        yield (*AT, "timesteps", "min"), f"must be less than max, which is {times.max:g}, not {times.min:g}"
    shift = times.shift
    if isinstance(shift, DynamicShiftConfig) and shift.base_image_seq_len >= shift.max_image_seq_len:
        yield (*AT, "timesteps", "shift", "base_image_seq_len"), "must be less than max_image_seq_len"


def _terminal(recipe: Recipe) -> Iterator[Found]:
    objective, kind = recipe.objective, recipe.adapter.kind
    if objective.zero_terminal_snr and objective.prediction == "epsilon":
        text = "must be v_prediction or sample with zero_terminal_snr: where no signal is left, epsilon says nothing"
        yield (*AT, "prediction"), f"{text} about the picture"
    if objective.zero_terminal_snr and recipe.prior.kind == "model":
        text = "must be images or none with objective.zero_terminal_snr: the untouched model knows other times"
        yield ("prior", "kind"), text
    for key in ("prediction", "zero_terminal_snr"):
        if getattr(objective, key) and kind not in CHANGES_WEIGHTS:
            yield (*AT, key), f"needs an adapter that changes layers ({', '.join(CHANGES_WEIGHTS)}), not {kind!r}"


def _kinds(objective: ObjectiveConfig) -> Iterator[Found]:
    """What is for diffusion beside what is for flow matching."""
    weighting = objective.weighting
    flow = [
        *(["timesteps.shift"] if objective.timesteps.shift else []),
        *([f"weighting {weighting.kind}"] if isinstance(weighting, SigmaWeighting) else []),
    ]
    if not flow:
        return
    text = f"is for discrete-time diffusion, but {flow[0]} is for flow matching"
    if isinstance(weighting, SnrWeighting):
        yield (*AT, "weighting", "kind"), f"{weighting.kind!r} {text}"
    if objective.prediction:
        yield (*AT, "prediction"), text
    if objective.zero_terminal_snr:
        yield (*AT, "zero_terminal_snr"), text
    if isinstance(objective.loss, TurningLoss) and objective.loss.schedule == "snr":
        yield (*AT, "loss", "schedule"), f"'snr' {text}"
