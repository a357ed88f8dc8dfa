"""What a run trains, seen from the outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that learn at the same pace.

    Attributes:
        name: for logs and for the optimizer's groups, for example "denoiser".
        parameters: by their canonical name (``<network>.<parameter path>``), in a fixed order.
        learning_rate: replaces the run's, where it is set.
        factor: what either is multiplied by.
        decays: whether weight decay acts on them.
        tables: names of parameters whose rows are looked up one by one, such as words: no matrices that map something.
        patience: how many updates may pass until each has had a gradient that is not zero. A LoRA's A needs two, since
            its B begins at zero; a word is not in every batch.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    learning_rate: float | None = None
    factor: float = 1.0
    decays: bool = True
    tables: frozenset[str] = frozenset()
    patience: int = 2


@dataclass(frozen=True)
class Weights:
    """A trained adapter at rest: what exporters write and importers read.

    Attributes:
        kind: what wrote it, a name of ``finetune.export.kinds.KINDS``.
        tensors: under canonical names, on the CPU. LoRA: ``<network>.<module>.lora_A.weight`` [r, in, ...],
            ``.lora_B.weight`` [out, r, ...] and ``.alpha`` [] such that the change of a weight is
            ``alpha / r * B A`` whatever the scaling rule of the training was, and with DoRA
            ``.lora_magnitude_vector.weight``. Lycoris: ``<network>.<module>.<part>``, PEFT's parts. Full:
            ``<network>.<parameter>``, only what was trained.
        settings: the method's settings as plain strings, for a file's header (rank, alpha, targets, ...).
    """

    kind: str
    tensors: dict[str, Tensor]
    settings: dict[str, str] = field(default_factory=dict)


class Adapter(Protocol):
    """Trainable weights already attached to a family's networks.

    Methods inherit from this class; those of its methods that have a body are for methods whose training has phases
    or constraints, and do nothing by default.
    """

    kind: ClassVar[str]
    phased: ClassVar[bool] = False
    """Whether some trained weights may have no part in the loss of some steps."""
    bounded: bool = False
    """Whether ``end_step`` changes weights."""

    def groups(self) -> list[ParameterGroup]:
        """All that is trained, and nothing else."""
        ...

    def networks(self) -> frozenset[str]:
        """The networks that hold trained weights; the others stay frozen and may be freed or cached."""
        ...

    def weights(self) -> Weights:
        """The trained weights, detached copies on the CPU."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put ``Weights.tensors`` back, bit for bit.

        Raises:
            UserError: a tensor is missing, unknown or of another shape.
        """
        ...

    def disabled(self) -> AbstractContextManager[None]:
        """Inside, the networks answer as they did before anything was trained."""
        ...

    def set_aside(self) -> Mapping[str, Tensor]:
        """Frozen weights of the base that hold something else while this trains, by canonical name: what they were."""
        return {}

    def parts(self) -> Sequence[Adapter]:
        """The adapters that this one is made of, each of which is exported for itself."""
        return (self,)

    def begin_run(self, steps: int) -> None:
        """Called once, before the first step of this or a continued run: how many updates it has in all."""
        return  # or type checkers take an empty body for an abstract one

    def share_networks(self) -> None:
        """Called once, where processes will hold the networks in pieces: each network must then run equally often on
        all of them.
        """
        return

    def begin_step(self, step: int) -> None:
        """Called before the forward passes of update ``step`` (updates done so far), also after a resume."""
        return

    def resting(self, step: int) -> frozenset[str]:
        """Names of groups whose weights update ``step`` must leave as they are, bit for bit."""
        return frozenset()

    def end_step(self, rates: Mapping[str, float]) -> None:
        """Called after each update, with the learning rate of each group: where weights are kept within bounds."""
        return

    def bytes_beside(self) -> int:
        """Bytes of tensors that are held beside the networks, such as weights of the base that others stand for."""
        return 0

    def penalty(self) -> Tensor | None:
        """What is added to the loss for weights that went astray, a scalar with gradient; None where there is none."""
        return None
