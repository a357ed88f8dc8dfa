"""The small networks themselves: how they are built, where they begin, what they add."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules import activation as _activation

from finetune.errors import UserError, nearest
from finetune.randomness import generator

ROLES = ("k", "v")
REFUSED = {"multiheadattention", "threshold", "glu", "softmax", "softmax2d", "softmin", "logsoftmax"}
"""Classes of ``torch.nn.modules.activation`` that need arguments, change the width or mix the pictures of a batch."""


def _activations() -> dict[str, type[nn.Module] | None]:
    found: dict[str, type[nn.Module] | None] = {"linear": None, "swish": nn.Hardswish}
    for name, kind in inspect.getmembers(_activation, inspect.isclass):
        if issubclass(kind, nn.Module) and kind.__module__ == _activation.__name__ and name.lower() not in REFUSED:
            found[name.lower()] = kind
    return found


ACTIVATIONS = _activations()
"""A1111's names; its "swish" is Hardswish."""


@dataclass(frozen=True)
class Structure:
    """How each of the small networks is built.

    Attributes:
        layers: widths as multiples of the input's; the first and the last are 1.
        activation: a name of ``ACTIVATIONS``.
        activate_output: also after the last linear layer.
        layer_norm: after every layer.
        dropout: one share for each entry of ``layers``, the first and the last 0; empty for none.

    Raises:
        UserError: the settings contradict each other.
    """

    layers: tuple[float, ...] = (1, 2, 1)
    activation: str = "linear"
    activate_output: bool = False
    layer_norm: bool = False
    dropout: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.layers) < 2 or self.layers[0] != 1 or self.layers[-1] != 1 or min(self.layers) <= 0:
            raise UserError(f"layers must be positive multiples that begin and end with 1, not {list(self.layers)}")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"there is no activation {self.activation!r}{nearest(self.activation, ACTIVATIONS)}")
        if self.dropout:
            ends = self.dropout[0] == self.dropout[-1] == 0
            if len(self.dropout) != len(self.layers) or not ends or not all(0 <= p < 1 for p in self.dropout):
                raise UserError(
                    f"dropout must hold {len(self.layers)} shares below 1, as layers does, the first and the last 0, "
                    f"not {list(self.dropout)}"
                )

    @classmethod
    def of(cls, said: Mapping[str, str]) -> Structure:
        """The reverse of ``as_text``; other keys are passed over."""
        return cls(
            layers=tuple(json.loads(said["layers"])),
            activation=said["activation"],
            activate_output=json.loads(said["activate_output"]),
            layer_norm=json.loads(said["layer_norm"]),
            dropout=tuple(json.loads(said["dropout"])),
        )

    def as_text(self) -> dict[str, str]:
        """The settings as ``Weights.settings`` hold them."""
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in vars(self).items()}

    def build(self, width: int) -> nn.Sequential:
        """The network for inputs of ``width``, on the meta device.

        Raises:
            UserError: a layer would have no width left.
        """
        if int(width * min(self.layers)) < 1:
            raise UserError(f"layers hold {min(self.layers):g}, which leaves nothing of a width of {width}")
        with torch.device("meta"):
            return nn.Sequential(*self._modules(width))

    def _modules(self, width: int) -> Iterator[nn.Module]:
        kind, last = ACTIVATIONS[self.activation], len(self.layers) - 2
        for index, (before, after) in enumerate(pairwise(self.layers)):
            yield nn.Linear(int(width * before), int(width * after))
            if kind is not None and (index < last or self.activate_output):
                yield kind()
            if self.layer_norm:
                yield nn.LayerNorm(int(width * after))
            if self.dropout and self.dropout[index + 1] > 0:
                yield nn.Dropout(self.dropout[index + 1])

    def without_dropout(self) -> Structure:
        """What it computes in ``eval()``, in fewer modules."""
        return replace(self, dropout=())

    def renumbered(self) -> dict[int, int]:
        """Place of a module here -> its place ``without_dropout``."""
        with torch.device("meta"):
            modules = list(self._modules(1024))
        kept = [index for index, module in enumerate(modules) if not isinstance(module, nn.Dropout)]
        return {old: new for new, old in enumerate(kept)}


class Mlp(nn.Module):
    """One small network, ``F``: [..., width] to the same shape."""

    def __init__(self, structure: Structure, width: int) -> None:
        super().__init__()
        self.linear = structure.build(width)

    def forward(self, states: Tensor) -> Tensor:
        """What is added to ``states``."""
        answer: Tensor = self.linear(states)
        return answer


class Hypernetwork(nn.ModuleDict):
    """A pair of networks for each width. Parameters are called ``768.k.linear.0.weight``; float32.

    Its values are zero until ``initialise`` or ``load`` has set them.

    Attributes:
        multiplier: how much it counts in ``eval()``; in ``train()`` it counts as it is.
        enabled: False leaves the denoiser as it is.
    """

    def __init__(self, structure: Structure, widths: Iterable[int]) -> None:
        pairs = {str(width): nn.ModuleDict({role: Mlp(structure, width) for role in ROLES}) for width in sorted(widths)}
        super().__init__(pairs)
        self.structure = structure
        self.multiplier, self.enabled = 1.0, True
        self.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()

    @property
    def widths(self) -> list[int]:
        """Of the inputs that it changes, ascending."""
        return [int(width) for width in self]

    def change(self, role: str, states: Tensor) -> Tensor:
        """``c + m F(c)``, computed in float32 and given back in the dtype of ``states``.

        Args:
            role: "k" or "v".
            states: [..., width]; a width that has no networks is left as it is.
        """
        strength = 1.0 if self.training else self.multiplier
        pair = self[str(states.shape[-1])] if self.enabled and str(states.shape[-1]) in self else None
        if pair is None or strength == 0:
            return states
        network = cast(nn.ModuleDict, pair)[role]
        if next(network.parameters()).device != states.device:
            self.to(states.device)  # a pipeline was moved, which does not know of this network
        exact = states.float()
        return (exact + strength * network(exact)).to(states.dtype)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over all values.

        Raises:
            UserError: a tensor is missing, unknown or of another shape.
        """
        held = dict(self.named_parameters())
        if missing := sorted(held.keys() - tensors.keys()):
            raise UserError(f"{len(missing)} tensors are missing, the first is {missing[0]!r}")
        if unknown := sorted(tensors.keys() - held.keys()):
            raise UserError(f"{len(unknown)} tensors are unknown, the first is {unknown[0]!r}")
        for name, parameter in held.items():
            if tensors[name].shape != parameter.shape:
                raise UserError(
                    f"{name}: the shape is {list(tensors[name].shape)}, expected {list(parameter.shape)} "
                    f"for layers {list(self.structure.layers)}"
                )
            parameter.copy_(tensors[name])


@torch.no_grad()
def initialise(network: Hypernetwork, rule: str, seed: int, zero_last: bool = False) -> Hypernetwork:
    """Set the values that training begins with; those of a module depend on ``seed`` and its name alone.

    Args:
        rule: for linear weights: "normal" (standard deviation 0.01), or "xavier_…" or "kaiming_…" with "uniform" or
            "normal". Weights of layer norms are normal whatever the rule, biases 0.
        zero_last: the last linear layer or layer norm is 0, so that nothing changes at first.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            rng = generator(seed, "hypernetwork", f"{name}.weight")
            _draw(module.weight, rule if isinstance(module, nn.Linear) else "normal", network.structure, rng)
            cast(Tensor, module.bias).zero_()
        elif isinstance(module, nn.PReLU):
            module.weight.fill_(0.25)  # torch's own start
    if zero_last:
        for mlp in (module for module in network.modules() if isinstance(module, Mlp)):
            last = [module for module in mlp.linear if isinstance(module, nn.Linear | nn.LayerNorm)][-1]
            last.weight.zero_()
    return network


def _draw(weight: Tensor, rule: str, structure: Structure, rng: torch.Generator) -> None:
    slope = "leaky_relu" if structure.activation == "leakyrelu" else "relu"
    match rule:
        case "normal":
            nn.init.normal_(weight, std=0.01, generator=rng)
        case "xavier_uniform":
            nn.init.xavier_uniform_(weight, generator=rng)
        case "xavier_normal":
            nn.init.xavier_normal_(weight, generator=rng)
        case "kaiming_uniform":
            nn.init.kaiming_uniform_(weight, nonlinearity=slope, generator=rng)  # type: ignore[arg-type]
        case "kaiming_normal":
            nn.init.kaiming_normal_(weight, nonlinearity=slope, generator=rng)  # type: ignore[arg-type]
        case _:
            raise UserError(f"there is no initialisation {rule!r}")
