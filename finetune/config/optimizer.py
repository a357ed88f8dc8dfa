"""What a recipe says of its optimizer. Each has a section with the keys that it uses, and no others."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, Strict, Tag

from finetune.config.section import Probability, Section, Text

CLASS = "module.Class"  # stands for any dotted path
PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
FLOAT = 4  # bytes
BLOCK = 256  # numbers that share one scale in an 8-bit state of bitsandbytes
SMALLEST = 4096  # parameters with fewer numbers keep float32 states there

Pair = Annotated[tuple[Probability, Probability], Strict(False)]
Triple = Annotated[tuple[Probability, Probability, Probability], Strict(False)]
Option = bool | int | float | Text | list[float]


class _Optimizer(Section):
    """What all have in common."""

    chosen_by: ClassVar[str] = "name"

    def state_bytes(self, shape: Sequence[int], table: bool = False) -> int:
        """Bytes kept between steps for a float32 parameter, without counters.

        Args:
            shape: of the parameter.
            table: its rows are looked up one by one, so that it maps nothing.
        """
        return 2 * FLOAT * math.prod(shape)


class AdamWConfig(_Optimizer):
    """AdamW (Loshchilov & Hutter 2019)."""

    name: Literal["adamw"] = "adamw"
    """Which optimizer."""
    betas: Pair = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled, times the learning rate."""
    kernel: Literal["fused", "foreach", "loop"] = "fused"
    """How torch computes it: all weights in one kernel, operation by operation for all, or weight by weight. Their last
    bits differ."""


class AdamW8bitConfig(_Optimizer):
    """AdamW with states of 8 bits (Dettmers et al. 2022), from bitsandbytes."""

    name: Literal["adamw8bit"]
    """Which optimizer. Needs a CUDA GPU and `pip install bitsandbytes`."""
    betas: Pair = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled, times the learning rate."""

    def state_bytes(self, shape: Sequence[int], table: bool = False) -> int:
        """Two bytes a number, and a scale for each block of both states."""
        return 2 * _eight_bits(math.prod(shape))


class SgdConfig(_Optimizer):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"]
    """Which optimizer."""
    momentum: Probability = 0.9
    """Share of the last step's direction that is kept."""
    nesterov: bool = False
    """Look ahead along the momentum (Sutskever et al. 2013)."""
    weight_decay: NonNegativeFloat = 0.01
    """Added to the gradient, times the weight."""

    def state_bytes(self, shape: Sequence[int], table: bool = False) -> int:
        """The momentum, where there is one."""
        return FLOAT * math.prod(shape) if self.momentum else 0


class LionConfig(_Optimizer):
    """Lion (Chen et al. 2023): every number moves by the learning rate, up or down."""

    name: Literal["lion"]
    """Which optimizer. Wants a learning rate 3 to 10 times smaller than AdamW's, and a weight decay as much larger."""
    betas: Pair = (0.9, 0.99)
    """Share of the momentum in a step's direction, and decay of the momentum."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled, times the learning rate."""

    def state_bytes(self, shape: Sequence[int], table: bool = False) -> int:
        """The momentum."""
        return FLOAT * math.prod(shape)


class Lion8bitConfig(_Optimizer):
    """Lion with a state of 8 bits, from bitsandbytes."""

    name: Literal["lion8bit"]
    """Which optimizer. Needs a CUDA GPU and `pip install bitsandbytes`."""
    betas: Pair = (0.9, 0.99)
    """Share of the momentum in a step's direction, and decay of the momentum."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled, times the learning rate."""

    def state_bytes(self, shape: Sequence[int], table: bool = False) -> int:
        """One byte a number, and a scale for each block."""
        return _eight_bits(math.prod(shape))


class AdafactorConfig(_Optimizer):
    """Adafactor (Shazeer & Stern 2018), from transformers: of squared gradients it keeps means of rows and columns."""

    name: Literal["adafactor"]
    """Which optimizer. The learning rate is the recipe's, not one of its own."""
    eps: Annotated[tuple[PositiveFloat, PositiveFloat], Strict(False)] = (1e-30, 1e-3)
    """Added to squared gradients; the smallest scale of a parameter, for `scale_parameter`."""
    clip_threshold: PositiveFloat = 1.0
    """Root mean square that an update is scaled down to where it is larger."""
    decay_rate: Annotated[float, Field(ge=-1.0, lt=0.0)] = -0.8
    """Power of the step that the decay of squared gradients approaches 1 with."""
    beta1: Probability | None = None
    """Decay of a running mean of updates; none where it is not set."""
    scale_parameter: bool = False
    """Multiply steps by a weight's own size. A LoRA's B, which begins at 0, then hardly moves."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled, times the learning rate."""

    def state_bytes(self, shape: Sequence[int], table: bool = False) -> int:
        """Rows and columns of the last two dimensions, or all numbers of a vector; and the mean of updates."""
        numbers = math.prod(shape)
        factored = numbers // shape[-1] + numbers // shape[-2] if len(shape) > 1 else numbers
        return FLOAT * (factored + (numbers if self.beta1 is not None else 0))


class CameConfig(_Optimizer):
    """CAME (Luo et al. 2023): Adafactor with momentum that trusts steady updates more."""

    name: Literal["came"]
    """Which optimizer. Its first steps are long: use a warm-up."""
    betas: Triple = (0.9, 0.999, 0.9999)
    """Decay of the means of updates, of squared gradients, and of how much updates vary."""
    eps: Annotated[tuple[PositiveFloat, PositiveFloat], Strict(False)] = (1e-30, 1e-16)
    """Added to squared gradients and to squared deviations."""
    clip_threshold: PositiveFloat = 1.0
    """Root mean square that an update is scaled down to where it is larger."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled, times the learning rate."""

    def state_bytes(self, shape: Sequence[int], table: bool = False) -> int:
        """The mean of updates; rows and columns twice, or a vector's squared gradients."""
        numbers = math.prod(shape)
        rest = 2 * (shape[0] + numbers // shape[0]) if len(shape) > 1 else numbers
        return FLOAT * (numbers + rest)


class ProdigyConfig(_Optimizer):
    """Prodigy (Mishchenko & Defazio 2023): Adam that finds its learning rate, for each group by itself."""

    name: Literal["prodigy"]
    """Which optimizer. `train.learning_rate` multiplies what it finds, and is 1 where it is not set."""
    betas: Pair = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    beta3: Probability | None = None
    """Decay of what the estimate is made from; the root of the second beta where it is not set."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled, times the learning rate that was found."""
    d0: PositiveFloat = 1e-6
    """Where the estimate begins; it only grows."""
    d_coef: PositiveFloat = 1.0
    """Multiplies each new estimate: below 1 for smaller steps."""
    growth_rate: Annotated[float, Field(gt=1.0)] | None = None
    """How many times larger an estimate may be than the one before; any where it is not set."""
    bias_correction: bool = True
    """Adam's correction of the first means, as a factor of the step. The paper has none: steps are then 3 to 7 times as
    long in the first hundred, and may diverge."""
    safeguard_warmup: bool = False
    """Keep the schedule out of the estimate's denominator, where a long warm-up would make the estimate too large."""

    def state_bytes(self, shape: Sequence[int], table: bool = False) -> int:
        """Both means, where the weight began, and a mean of gradients."""
        return 4 * FLOAT * math.prod(shape)


class ScheduleFreeConfig(_Optimizer):
    """Schedule-free AdamW (Defazio et al. 2024): an average of all steps takes the place of a falling learning rate."""

    name: Literal["schedulefree"]
    """Which optimizer. Previews and exports use the average."""
    betas: Annotated[tuple[Annotated[float, Field(gt=0.0, lt=1.0)], Probability], Strict(False)] = (0.9, 0.999)
    """How near to the average gradients are taken, and decay of the mean of their squares."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled, times the learning rate, where the gradient is taken."""
    r: NonNegativeFloat = 0.0
    """Power of the step that it counts in the average with: above 0 for more of the last ones."""
    weight_lr_power: NonNegativeFloat = 2.0
    """Power of the highest learning rate so far that a step counts in the average with: less of a warm-up."""


class MuonConfig(_Optimizer):
    """Muon (Jordan et al. 2024): a matrix moves by its momentum made orthogonal; all else by AdamW at the same rate."""

    name: Literal["muon"]
    """Which optimizer. Matrices, a LoRA's among them, take steps of AdamW's size (Liu et al. 2025)."""
    momentum: Probability = 0.95
    """Of matrices."""
    nesterov: bool = True
    """Look ahead along the momentum."""
    ns_steps: Annotated[PositiveInt, Field(lt=100)] = 5
    """Newton-Schulz iterations."""
    betas: Pair = (0.9, 0.999)
    """Of AdamW, for what is no matrix: vectors, convolutions, rows of tables."""
    eps: PositiveFloat = 1e-8
    """Of AdamW."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled, times the learning rate."""

    def state_bytes(self, shape: Sequence[int], table: bool = False) -> int:
        """The momentum of a matrix; two means of anything else."""
        return FLOAT * math.prod(shape) * (1 if len(shape) == 2 and not table else 2)


class ClassConfig(_Optimizer):
    """Any other optimizer class that is installed."""

    name: Annotated[str, Field(pattern=PATH, examples=[CLASS])]
    """Where it is imported from: `torch.optim.RAdam`."""
    options: dict[Text, Option] = {}
    """What it is called with beside the weights and the learning rate."""

    def state_bytes(self, shape: Sequence[int], table: bool = False) -> int:
        """Not known before it runs: 0."""
        return 0


def _which(value: Any) -> Any:
    """The tag of a section of `train.optimizer`."""
    name = value.get("name", "adamw") if isinstance(value, dict) else getattr(value, "name", None)
    return CLASS if isinstance(name, str) and PATH.fullmatch(name) else name


OptimizerConfig = Annotated[
    Annotated[AdamWConfig, Tag("adamw")]
    | Annotated[AdamW8bitConfig, Tag("adamw8bit")]
    | Annotated[SgdConfig, Tag("sgd")]
    | Annotated[LionConfig, Tag("lion")]
    | Annotated[Lion8bitConfig, Tag("lion8bit")]
    | Annotated[AdafactorConfig, Tag("adafactor")]
    | Annotated[CameConfig, Tag("came")]
    | Annotated[ProdigyConfig, Tag("prodigy")]
    | Annotated[ScheduleFreeConfig, Tag("schedulefree")]
    | Annotated[MuonConfig, Tag("muon")]
    | Annotated[ClassConfig, Tag(CLASS)],
    Field(discriminator=Discriminator(_which)),
]


def _eight_bits(numbers: int) -> int:
    return numbers + FLOAT * -(-numbers // BLOCK) if numbers >= SMALLEST else FLOAT * numbers
