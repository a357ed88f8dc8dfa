"""Changes of layers that are no product of two factors, through PEFT.

- LoHa: ``s (W1a W1b) * (W2a W2b)``, element by element (Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098).
- LoKr: ``s W1 (x) W2``, Kronecker's product, where ``W2`` is whole or itself ``W2a W2b`` (Yeh et al. 2024,
  https://arxiv.org/abs/2309.14859).
- OFT: ``W R x``, a rotation of the inputs in blocks, ``R = (I - Q)(I + Q)^-1`` with ``Q`` skew-symmetric (Qiu et al.
  2023, https://arxiv.org/abs/2306.07280).

``s = alpha / rank``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import peft
import torch
from torch import Tensor, nn

from finetune.adapter import Weights
from finetune.adapters.inject import NAME, Injected, as_settings, exactly
from finetune.adapters.select import check_same
from finetune.config.adapters import LohaConfig, LokrConfig, OftConfig
from finetune.errors import UserError
from finetune.family import ModelFamily

ZERO = {"lokr": ("lokr_w1",), "loha": ("hada_w2_b",), "oft": ("oft_R",)}  # what makes the change nothing at first


class Lycoris(Injected):
    """LoKr, LoHa or OFT in a family's networks, which are frozen otherwise. Nothing changes before training.

    Raises:
        UserError: a target matches no linear or convolution layer; OFT is asked of a convolution with a kernel, or
            its blocks do not divide a layer's inputs.
    """

    kind: ClassVar[str] = "lycoris"

    def __init__(self, config: LokrConfig | LohaConfig | OftConfig, family: ModelFamily, seed: int) -> None:
        self.config = config
        super().__init__(config, family, seed)

    def _prepare(self, chosen: Mapping[str, nn.Module]) -> None:
        if isinstance(self.config, OftConfig):
            for name, layer in chosen.items():
                _check_rotation(name, layer, self.config.block_size)

    def _described(self, network: str, names: Sequence[str]) -> peft.PeftConfig:
        targets = exactly(names)
        match self.config:
            case LokrConfig(rank=rank, factor=factor):
                return peft.LoKrConfig(r=rank, alpha=self._alpha, decompose_factor=factor, target_modules=targets)
            case LohaConfig(rank=rank):
                return peft.LoHaConfig(r=rank, alpha=self._alpha, target_modules=targets)
            case OftConfig(block_size=size, exact=exact):
                return peft.OFTConfig(oft_block_size=size, use_cayley_neumann=not exact, target_modules=targets)

    @torch.no_grad()
    def _initialise(self, name: str, layer: Any, rng: torch.Generator) -> None:
        layer.register_forward_pre_hook(_without_chance)
        for part, values in _parts(layer).items():
            drawn = torch.zeros(values.shape)
            if part not in ZERO[self.config.kind]:
                nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=rng)
            values.data = drawn.to(values.device)  # float32 on a base of any type

    def parameters(self) -> dict[str, nn.Parameter]:
        """What PEFT added, as ``<network>.<module>.<part>``: ``hada_w1_a``, ``lokr_w1``, ``oft_R`` and their like."""
        found = {name: _parts(layer) for name, layer in self.layers.items()}
        return {f"{name}.{part}": values for name, parts in found.items() for part, values in parts.items()}

    def weights(self) -> Weights:
        """What PEFT added, and with LoKr and LoHa ``<network>.<module>.alpha``.

        ``settings`` say which of the three it is (``algorithm``), and for OFT how rotations are made (``exact``): the
        same numbers mean another rotation with the other rule.
        """
        tensors = {name: values.detach().cpu().clone() for name, values in self.parameters().items()}
        settings = {"algorithm": self.config.kind, **as_settings(self.config)}
        if not isinstance(self.config, OftConfig):
            tensors |= {f"{name}.alpha": torch.tensor(self._alpha) for name in self.layers}
            settings["alpha"] = json.dumps(self._alpha)
        return Weights(self.kind, tensors, settings)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put ``weights().tensors`` back, bit for bit.

        Raises:
            UserError: a tensor is missing, unknown or of another shape, or an alpha is another.
        """
        check_same(self.weights().tensors, tensors)
        for name, found in tensors.items():
            if name.endswith(".alpha") and float(found) != float(torch.tensor(self._alpha)):
                raise UserError(f"{name} is {float(found):g}, this adapter has {self._alpha:g}")
        for name, values in self.parameters().items():
            values.copy_(tensors[name])

    @property
    def _alpha(self) -> float:
        assert not isinstance(self.config, OftConfig), "a rotation has no scale"
        return self.config.alpha or float(self.config.rank)


def _without_chance(layer: nn.Module, _: tuple[Tensor, ...]) -> None:
    """In ``train()`` PEFT would draw a number for each layer and pass, and leave the layer out where that is 0."""
    layer.training = False


def _parts(layer: Any) -> dict[str, nn.Parameter]:
    """What PEFT added to a layer, by the names of its attributes."""
    held = {part: getattr(layer, part) for part in layer.adapter_layer_names}
    added: dict[str, Any] = {part: values[NAME] for part, values in held.items() if NAME in values}
    return {part: getattr(one, "weight", one) for part, one in added.items()}  # OFT has a module about it


def _check_rotation(name: str, layer: Any, size: int) -> None:
    if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
        height, width = layer.kernel_size
        raise UserError(
            f"adapter.targets: {name} is a {height}x{width} convolution, whose patches overlap: PEFT's OFT answers "
            "wrongly there; leave it out, 'wide' has none"
        )
    inputs = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
    if inputs % size:
        fitting = [n for n in range(2, inputs + 1) if inputs % n == 0]
        nearest = min(fitting, key=lambda n: abs(n - size))
        raise UserError(f"adapter.block_size: {size} does not divide the {inputs} inputs of {name}; {nearest} does")
