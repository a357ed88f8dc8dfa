"""Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685), through PEFT.

A layer ``W x`` becomes ``W x + s B A x`` with ``s = alpha / rank``, or ``alpha / sqrt(rank)`` where ranks are
stabilised (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732). For a k x k convolution ``A`` is one like it with
``rank`` outputs and ``B`` is 1 x 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from finetune.adapter import ParameterGroup, Weights
from finetune.adapters.select import check_same, select
from finetune.config.schema import LoraConfig
from finetune.errors import UserError
from finetune.family import ModelFamily
from finetune.randomness import generator

_NAME = "default"  # PEFT's, for the only adapter of a layer


class Lora:
    """Low-rank factors in a family's networks, which are frozen otherwise. Implements ``finetune.adapter.Adapter``.

    Factors are float32 whatever the base is, and ``B`` is zero at first, so nothing changes until something is
    learned. ``layers`` holds the adapted layers by canonical name, ``<network>.<module path>``.

    Raises:
        UserError: a target matches no linear or convolution layer.
    """

    kind: ClassVar[str] = "lora"

    def __init__(self, config: LoraConfig, family: ModelFamily, seed: int) -> None:
        self.config = config
        self.layers: dict[str, Any] = {}
        trained = ["denoiser", *(family.text_encoders if config.text_encoder else [])]
        family.require(*trained)
        family.networks.requires_grad_(False)
        for network in trained:
            wanted = config.targets if network == "denoiser" else "attention"
            self._inject(network, family.networks[network], wanted, family)
        for name, layer in self.layers.items():
            self._initialise(layer, generator(seed, "lora", name))

    def _inject(self, network: str, module: nn.Module, wanted: str | list[str], family: ModelFamily) -> None:
        adaptable = [name for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
        chosen = select("adapter.targets", wanted, family.sites.linears, network, adaptable, re.Pattern.fullmatch)
        described = peft.LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha or self.config.rank,
            lora_dropout=self.config.dropout,
            use_rslora=self.config.use_rslora,
            target_modules="|".join(re.escape(name) for name in chosen),
        )
        with torch.random.fork_rng(devices=[]):  # PEFT draws values that are then replaced
            peft.inject_adapter_in_model(described, module, adapter_name=_NAME)
        module.train(module.training)  # new layers would drop out although their network does not train
        self.layers |= {f"{network}.{name}": module.get_submodule(name) for name in chosen}

    @torch.no_grad()
    def _initialise(self, layer: LoraLayer, rng: torch.Generator) -> None:
        down, up = layer.lora_A[_NAME].float(), layer.lora_B[_NAME].float()
        drawn = torch.empty(down.weight.shape)
        if self.config.init == "gaussian":
            drawn.normal_(std=1 / self.config.rank, generator=rng)
        else:  # Kaiming with a = sqrt(5), the rule of nn.Linear
            bound = 1 / math.sqrt(down.weight[0].numel())
            drawn.uniform_(-bound, bound, generator=rng)
        down.weight.copy_(drawn)
        up.weight.zero_()

    def groups(self) -> list[ParameterGroup]:
        """The factors of the denoiser, then those of each text encoder with its own learning rate."""
        groups: dict[str, dict[str, nn.Parameter]] = {}
        for name, parameter in self._factors().items():
            groups.setdefault(name.split(".")[0], {})[name] = parameter
        rate = self.config.text_encoder_learning_rate
        return [
            ParameterGroup(network, parameters, None if network == "denoiser" else rate)
            for network, parameters in groups.items()
        ]

    def networks(self) -> frozenset[str]:
        """The networks that hold factors."""
        return frozenset(name.split(".")[0] for name in self.layers)

    def weights(self) -> Weights:
        """Factors and effective alphas: the change of a weight is ``alpha / rank * B A``."""
        tensors = {name: parameter.detach().cpu().clone() for name, parameter in self._factors().items()}
        alpha = torch.tensor(self._effective_alpha())
        tensors |= {f"{name}.alpha": alpha.clone() for name in self.layers}
        settings = self.config.model_dump(exclude={"kind", "text_encoder_learning_rate"})
        settings["alpha"] = self.config.alpha or float(self.config.rank)
        return Weights(self.kind, tensors, {name: _as_text(value) for name, value in settings.items()})

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put ``weights().tensors`` back, bit for bit.

        Raises:
            UserError: a tensor is missing, unknown or of another shape, or an alpha is another.
        """
        factors, alpha = self._factors(), torch.tensor(self._effective_alpha())
        alphas = {f"{name}.alpha": alpha for name in self.layers}
        check_same({**factors, **alphas}, tensors)
        for name in alphas:
            if float(tensors[name]) != float(alpha):
                raise UserError(f"{name}: alpha is {float(tensors[name]):g}, this adapter has {float(alpha):g}")
        for name, parameter in factors.items():
            parameter.copy_(tensors[name])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, every layer answers as its base does: bit-equal to the untouched network."""
        asked = {name: parameter.requires_grad for name, parameter in self._factors().items()}
        for layer in self.layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enable_adapters(True)
            for name, parameter in self._factors().items():  # PEFT sets these as well
                parameter.requires_grad_(asked[name])

    @contextmanager
    def scaled(self, strength: float) -> Iterator[None]:
        """Inside, every change counts ``strength`` times: 0 is the base, 1 what was trained."""
        trained = {name: layer.scaling[_NAME] for name, layer in self.layers.items()}
        for layer in self.layers.values():
            layer.scaling[_NAME] *= strength
        try:
            yield
        finally:
            for name, layer in self.layers.items():
                layer.scaling[_NAME] = trained[name]

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Inside, changes are added into the base weights, which is faster; afterwards these are bit-equal to before.

        For inference only. Weights are put back from a copy: to subtract what was added would not be exact.
        """
        kept = {name: layer.get_base_layer().weight.detach().clone() for name, layer in self.layers.items()}
        with self.disabled(), torch.no_grad():
            try:
                for layer in self.layers.values():
                    layer.get_base_layer().weight += layer.get_delta_weight(_NAME)
                yield
            finally:
                for name, layer in self.layers.items():
                    layer.get_base_layer().weight.copy_(kept[name])

    def _effective_alpha(self) -> float:
        alpha = self.config.alpha or float(self.config.rank)
        return alpha * math.sqrt(self.config.rank) if self.config.use_rslora else alpha

    def _factors(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{factor}.weight": getattr(layer, factor)[_NAME].weight
            for name, layer in self.layers.items()
            for factor in ("lora_A", "lora_B")
        }


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
