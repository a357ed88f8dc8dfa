"""What a run trains, seen from the outside."""

from __future__ import annotations

from collections.abc import Mapping
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
    """

    name: str
    parameters: dict[str, nn.Parameter]
    learning_rate: float | None = None


@dataclass(frozen=True)
class Weights:
    """A trained adapter at rest: what exporters write and importers read.

    Attributes:
        kind: "lora" or "full".
        tensors: under canonical names, on the CPU. LoRA: ``<network>.<module>.lora_A.weight`` [r, in, ...],
            ``.lora_B.weight`` [out, r, ...] and ``.alpha`` [] such that the change of a weight is
            ``alpha / r * B A`` whatever the scaling rule of the training was. Full:
            ``<network>.<parameter>``, only what was trained.
        settings: the method's settings as plain strings, for a file's header (rank, alpha, targets, ...).
    """

    kind: str
    tensors: dict[str, Tensor]
    settings: dict[str, str] = field(default_factory=dict)


class Adapter(Protocol):
    """Trainable weights already attached to a family's networks."""

    kind: ClassVar[str]

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
