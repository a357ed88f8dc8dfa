"""Low-rank layers: the form between an adapter in memory and a file of any layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.adapter import Weights
from finetune.errors import GuardError

DOWN, UP, ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
MAGNITUDE = ".lora_magnitude_vector.weight"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The trained change of one linear or convolution layer, ``alpha / rank * up down``.

    With a magnitude (DoRA) the rows of the weight so changed are then given these lengths.

    Attributes:
        network: as in ``ModelFamily.networks``.
        module: path inside the network.
        down: float [r, in] or [r, in, kh, kw].
        up: float [out, r] or [out, r, 1, 1].
        alpha: what the change is scaled by, before the division by the rank.
        magnitude: float [out] or [1, out, 1, 1]; None of a plain LoRA.
    """

    network: str
    module: str
    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def name(self) -> str:
        """Canonical name, ``<network>.<module>``."""
        return f"{self.network}.{self.module}"

    @property
    def rank(self) -> int:
        """Width between the factors."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """The product of the factors, scaled: float32 [out, in, ...]."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.scale * product.view(self.up.shape[0], *self.down.shape[1:])

    def changed(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """What becomes of a layer's weight, float32 [out, in, ...]."""
        moved = weight.float() + strength * self.delta()
        if self.magnitude is None:
            return moved
        rows = moved.flatten(1)
        return (self.magnitude.float().view(-1, 1) / rows.norm(dim=1, keepdim=True) * rows).view(weight.shape)

    def answer(self, module: nn.Module, x: Tensor) -> Tensor:
        """What ``delta`` adds to the output of ``module`` for its input ``x``."""
        down, up = self.down.to(x), self.up.to(x)
        if isinstance(module, nn.Conv2d):
            inner = F.conv2d(x, down, None, module.stride, module.padding, module.dilation)
            return F.conv2d(inner, up) * self.scale
        return F.linear(F.linear(x, down), up) * self.scale


def layers(weights: Weights) -> list[Layer]:
    """The layers of a LoRA, in the order of their names.

    Raises:
        GuardError: a tensor is missing, left over, empty, not floating, not finite or of a shape that does not fit
            its partner.
    """
    check(weights.tensors)
    rest = dict(weights.tensors)
    found = []
    for key in sorted(key for key in weights.tensors if key.endswith(DOWN)):
        name = key.removesuffix(DOWN)
        missing = [name + part for part in (UP, ALPHA) if name + part not in rest]
        if missing:
            raise GuardError(f"the adapter has {key} but not {', '.join(missing)}")
        network, module = name.split(".", 1)
        down, up, alpha = rest.pop(key), rest.pop(name + UP), float(rest.pop(name + ALPHA))
        magnitude = rest.pop(name + MAGNITUDE, None)
        found.append(Layer(network=network, module=module, down=down, up=up, alpha=alpha, magnitude=magnitude))
    if rest:
        raise GuardError(f"the adapter has tensors that belong to no low-rank layer, for example {min(rest)}")
    for layer in found:
        check_shape(layer)
    return found


def weights_of(found: Iterable[Layer], settings: Mapping[str, str] | None = None) -> Weights:
    """The layers under their canonical names."""
    tensors: dict[str, Tensor] = {}
    for layer in found:
        tensors[layer.name + DOWN] = layer.down
        tensors[layer.name + UP] = layer.up
        tensors[layer.name + ALPHA] = torch.tensor(layer.alpha, dtype=torch.float32)
        if layer.magnitude is not None:
            tensors[layer.name + MAGNITUDE] = layer.magnitude
    return Weights("lora", tensors, dict(settings or {}))


def check(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that nobody can use.

    Raises:
        GuardError: there are none, or one is empty, not floating or not finite.
    """
    if not tensors:
        raise GuardError("the adapter holds no tensors; nothing was trained")
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise GuardError(f"{name} is empty {list(tensor.shape)}; a sharded weight must be gathered before export")
        if not tensor.is_floating_point():
            raise GuardError(f"{name} is {_dtype(tensor)}; weights are floating-point numbers")
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise GuardError(f"{name} holds {bad} of {tensor.numel()} numbers that are NaN or infinite")


def check_shape(layer: Layer) -> None:
    """Refuse factors that cannot be multiplied.

    Raises:
        GuardError: the factors do not share a rank or an axis count, alpha is not positive, or there is not one
            magnitude for each row.
    """
    shapes = f"{layer.name}: lora_A is {list(layer.down.shape)} and lora_B is {list(layer.up.shape)}"
    if layer.down.ndim not in (2, 4) or layer.up.ndim != layer.down.ndim:
        raise GuardError(f"{shapes}; both have 2 axes (linear) or 4 (convolution)")
    if layer.up.shape[1] != layer.rank or layer.up.shape[2:] != (1,) * (layer.up.ndim - 2):
        raise GuardError(f"{shapes}; expected [rank, in, ...] and [out, rank, 1...]")
    if not layer.alpha > 0:
        raise GuardError(f"{layer.name}: alpha is {layer.alpha}; expected more than 0")
    rows = layer.up.shape[0]
    if layer.magnitude is not None and layer.magnitude.shape != ((rows,) if layer.up.ndim == 2 else (1, rows, 1, 1)):
        raise GuardError(f"{layer.name}: magnitudes are {list(layer.magnitude.shape)}, one for each of {rows} rows")


def check_learned(found: Sequence[Layer]) -> None:
    """Refuse a network whose every ``lora_B`` is zero.

    Raises:
        GuardError: naming the network.
    """
    for network in sorted({layer.network for layer in found}):
        ups = [layer.up for layer in found if layer.network == network]
        if not any(bool(up.any()) for up in ups):
            raise GuardError(f"nothing was learned in {network}: lora_B is zero in all {len(ups)} layers")


@contextmanager
def applied(networks: Mapping[str, nn.Module], found: Iterable[Layer], strength: float = 1.0) -> Iterator[None]:
    """Inside, the networks answer as if the layers were part of them. Without PEFT, so that PEFT can be checked."""

    def add(layer: Layer, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if layer.magnitude is None:
                return output + strength * layer.answer(module, inputs[0])
            weight: Any = module.weight
            return output + _through(module, layer.changed(weight, strength) - weight, inputs[0])

        return module.register_forward_hook(hook)

    with ExitStack() as stack:
        for layer in found:
            handle = add(layer, networks[layer.network].get_submodule(layer.module))
            stack.callback(handle.remove)
        yield


def _through(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """The answer of a layer like ``module`` with another weight and no bias."""
    if isinstance(module, nn.Conv2d):
        return F.conv2d(x, weight.to(x), None, module.stride, module.padding, module.dilation)
    return F.linear(x, weight.to(x))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
