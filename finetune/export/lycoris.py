"""LoKr, LoHa, OFT and whole differences: the form between an adapter in memory and a file, and its arithmetic.

The arithmetic is written from the formulas and not PEFT's, so that PEFT can be checked with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.adapter import Weights
from finetune.errors import GuardError
from finetune.export.layers import Layer, check
from finetune.family import ModelFamily

PARTS: Mapping[str, tuple[str, ...]] = {
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    "oft": ("oft_R",),
    "full": ("diff",),
}
LAST = {"loha": "hada_w2_b", "lokr": "lokr_w1", "oft": "oft_R", "full": "diff"}  # zero until something is learned


@dataclass(frozen=True, kw_only=True)
class Change:
    """The trained change of one linear or convolution layer.

    Attributes:
        network: as in ``ModelFamily.networks``.
        module: path inside the network.
        algorithm: a key of ``PARTS``.
        parts: tensors by the names of ``PARTS``.
        scale: of the whole change, where there is one (LoHa and LoKr).
        exact: whether OFT's rotation is Cayley's transform itself, and not the first terms of its series.
    """

    network: str
    module: str
    algorithm: str
    parts: Mapping[str, Tensor]
    scale: float = 1.0
    exact: bool = True

    @property
    def name(self) -> str:
        """Canonical name, ``<network>.<module>``."""
        return f"{self.network}.{self.module}"

    @property
    def rank(self) -> int | None:
        """Inner size of the last product; None where there is no product, as between two whole factors of LoKr."""
        inner = {"loha": ("hada_w1_b",), "lokr": ("lokr_w2_b", "lokr_w1_b")}.get(self.algorithm, ())
        return next((self.parts[part].shape[0] for part in inner if part in self.parts), None)

    def changed(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """What becomes of a layer's weight, float32 [out, in, ...]. A rotation has no strength but 1.

        Raises:
            GuardError: the parts do not fit the weight or each other.
        """
        try:
            if self.algorithm == "oft":
                return self._rotated(weight.float())
            return weight.float() + strength * self.difference().reshape(weight.shape)
        except RuntimeError as error:
            shapes = {part: list(tensor.shape) for part, tensor in self.parts.items()}
            raise GuardError(f"{self.name}: {shapes} do not fit a weight {list(weight.shape)}") from error

    def difference(self) -> Tensor:
        """What is added to a weight: float32 [out, in, ...], of a convolution also [out, in * k * k]. A rotation adds
        nothing.
        """
        return self.scale * self._product()

    def _product(self) -> Tensor:
        parts = {name: tensor.float() for name, tensor in self.parts.items()}
        if self.algorithm == "full":
            return parts["diff"]
        if self.algorithm == "loha":
            return (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
        first, second = (_factor(parts, f"lokr_w{number}") for number in (1, 2))
        return torch.kron(first.view(*first.shape, *[1] * (second.ndim - 2)), second)

    def _rotated(self, weight: Tensor) -> Tensor:
        vectors = self.parts["oft_R"].float()
        blocks, size = len(vectors), _side(vectors.shape[1])
        rows, columns = torch.triu_indices(size, size, 1)
        skew = vectors.new_zeros(blocks, size, size)
        skew[:, rows, columns] = vectors
        skew = skew - skew.transpose(1, 2)
        one = torch.eye(size)
        if self.exact:
            rotation = (one - skew) @ torch.linalg.inv(one + skew)
        else:  # PEFT's five terms; their sign makes it the inverse of the above
            square = skew @ skew
            rotation = one + 2 * skew + 2 * square + 2 * square @ skew + square @ square
        inputs = weight.flatten(1).view(len(weight), blocks, size)
        return torch.einsum("obk,bjk->obj", inputs, rotation).reshape(weight.shape)


def changes(weights: Weights) -> list[Change]:
    """The layers of a LoKr, LoHa or OFT, in the order of their names.

    Raises:
        GuardError: a tensor is empty, not finite or of another method.
    """
    check(weights.tensors)
    algorithm = weights.settings["algorithm"]
    found: dict[str, dict[str, Tensor]] = {}
    for key in sorted(weights.tensors):
        name, _, part = key.rpartition(".")
        if part not in (*PARTS[algorithm], "alpha"):
            raise GuardError(f"{key} is no part of a {algorithm} layer")
        found.setdefault(name, {})[part] = weights.tensors[key]
    exact = weights.settings.get("exact") != "false"
    made = []
    for name, parts in found.items():
        network, _, module = name.partition(".")
        alpha = parts.pop("alpha", None)
        scale = 1.0 if alpha is None else float(alpha) / int(weights.settings["rank"])
        made.append(Change(network=network, module=module, algorithm=algorithm, parts=parts, scale=scale, exact=exact))
    return made


def differences(layers: Iterable[Layer], family: ModelFamily) -> list[Change]:
    """What layers make of the untouched base's weights, as whole differences [out, in, ...], float32."""
    ordered = sorted(layers, key=lambda layer: layer.name)
    bases = {network: family.fresh(network) for network in {layer.network for layer in ordered}}
    found = []
    for layer in ordered:
        weight = bases[layer.network].get_parameter(f"{layer.module}.weight").detach().float()
        parts = {"diff": layer.changed(weight) - weight}
        found.append(Change(network=layer.network, module=layer.module, algorithm="full", parts=parts))
    return found


def check_learned(found: Sequence[Change]) -> None:
    """Refuse a network of which every layer is as it was.

    Raises:
        GuardError: naming the network.
    """
    for network in sorted({change.network for change in found}):
        last = [part for one in found if one.network == network for part in _last(one)]
        if not any(bool(part.any()) for part in last):
            raise GuardError(f"nothing was learned in {network}: {LAST[found[0].algorithm]} is zero in every layer")


@contextmanager
def replaced(networks: Mapping[str, nn.Module], found: Iterable[Change], strength: float = 1.0) -> Iterator[None]:
    """Inside, the changes are in the networks' weights. Without PEFT, so that PEFT can be checked."""
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for change in found:
            weight = networks[change.network].get_parameter(f"{change.module}.weight")
            kept.append((weight, weight.data))
            weight.data = change.changed(weight.detach(), strength).to(weight)
        yield
    finally:
        for weight, before in kept:
            weight.data = before


def _last(change: Change) -> list[Tensor]:
    """What is zero before training; of a first factor that is a product, both."""
    return [tensor for part, tensor in change.parts.items() if part.startswith(LAST[change.algorithm])]


def _factor(parts: Mapping[str, Tensor], name: str) -> Tensor:
    return parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"]


def _side(numbers: int) -> int:
    """The side of a skew-symmetric matrix with so many numbers above its diagonal."""
    side = round((1 + (1 + 8 * numbers) ** 0.5) / 2)
    if side * (side - 1) // 2 != numbers:
        raise RuntimeError(f"{numbers} numbers fill no triangle")
    return side
