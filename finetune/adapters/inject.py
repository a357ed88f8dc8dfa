"""What adapters of single layers share: PEFT puts them in place, and everything else is the same for all of them."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import peft
import torch
from torch import Tensor, nn

from finetune.adapter import Adapter, ParameterGroup
from finetune.adapters.select import networks, select
from finetune.config.adapters import InjectedConfig
from finetune.family import ModelFamily
from finetune.randomness import generator

NAME = "default"  # PEFT's, for the only adapter of a layer
WATCHED = 2  # updates in which every weight must feel the loss; dropouts begin after them


class Injected(Adapter):
    """Trainable layers around chosen layers of a family's networks, which are frozen otherwise.

    ``layers`` holds them by canonical name, ``<network>.<module path>``. Initial values are drawn from a generator
    named by the seed and the layer, so that adding a target changes no other layer's start.

    Raises:
        UserError: a target matches no linear or convolution layer, or the method has no place in one.
    """

    def __init__(self, config: InjectedConfig, family: ModelFamily, seed: int) -> None:
        self.layers: dict[str, Any] = {}
        self._module_dropout = config.module_dropout
        self._text_rate = config.text_encoder_learning_rate
        self._dropping = False
        trained = networks(family, config.text_encoder)
        family.require(*trained)
        family.networks.requires_grad_(False)
        chosen = {network: _chosen(network, config, family) for network in trained}
        self._prepare({f"{n}.{name}": layer for n, found in chosen.items() for name, layer in found.items()})
        for network, found in chosen.items():
            self._inject(network, family.networks[network], list(found))
        for name, layer in self.layers.items():
            self._initialise(name, layer, generator(seed, self.kind, name))
            if self._module_dropout:
                layer.register_forward_hook(self._drop_module)

    def _inject(self, network: str, module: nn.Module, names: Sequence[str]) -> None:
        described = self._described(network, names)
        with torch.random.fork_rng(devices=[]):  # PEFT draws values that are then replaced
            peft.inject_adapter_in_model(described, module, adapter_name=NAME)
        module.train(module.training)  # new layers would drop out although their network does not train
        self.layers |= {f"{network}.{name}": module.get_submodule(name) for name in names}

    def _prepare(self, chosen: Mapping[str, nn.Module]) -> None:
        """Look at the layers that will be adapted, before they are; raise UserError where the method has no place."""

    @abstractmethod
    def _described(self, network: str, names: Sequence[str]) -> peft.PeftConfig:
        """PEFT's settings for the named layers of a network."""

    @abstractmethod
    def _initialise(self, name: str, layer: Any, rng: torch.Generator) -> None:
        """Put a layer's initial values in place, drawn from ``rng``."""

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """All that trains, by canonical name."""

    def groups(self) -> list[ParameterGroup]:
        """What trains in the denoiser, then that of each text encoder with its own learning rate."""
        return [ParameterGroup(name, found, self.rate(name)) for name, found in self.by_network().items()]

    def by_network(self) -> dict[str, dict[str, nn.Parameter]]:
        """``parameters``, apart for each network."""
        found: dict[str, dict[str, nn.Parameter]] = {}
        for name, parameter in self.parameters().items():
            found.setdefault(name.split(".")[0], {})[name] = parameter
        return found

    def rate(self, network: str) -> float | None:
        """What replaces the run's learning rate in a network."""
        return None if network == "denoiser" else self._text_rate

    def networks(self) -> frozenset[str]:
        """The networks that hold adapted layers."""
        return frozenset(name.split(".")[0] for name in self.layers)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, every layer answers as its base does: bit-equal to the untouched network."""
        asked = {name: parameter.requires_grad for name, parameter in self.parameters().items()}
        for layer in self.layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enable_adapters(True)
            for name, parameter in self.parameters().items():  # PEFT sets these as well
                parameter.requires_grad_(asked[name])

    def begin_step(self, step: int) -> None:
        """Dropouts begin after the updates in which a run makes sure that every weight learns."""
        self._dropping = step >= WATCHED

    def _drop_module(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Sometimes the base's answer alone. What is left out gets gradients of zero, not none, which other processes
        would wait for.
        """
        if not (self._dropping and layer.base_layer.training) or layer.disable_adapters:
            return None
        if float(torch.rand(())) >= self._module_dropout:
            return None
        answer: Tensor = layer.base_layer(*inputs) + 0 * output
        return answer


def as_settings(config: InjectedConfig, **changes: Any) -> dict[str, str]:
    """A section as plain strings, for a file's header."""
    settings = config.model_dump(exclude={"kind", "text_encoder_learning_rate"}) | changes
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}


def exactly(names: Sequence[str]) -> str:
    """A pattern for PEFT that matches these layers and no others."""
    return "|".join(re.escape(name) for name in names)


def _chosen(network: str, config: InjectedConfig, family: ModelFamily) -> dict[str, nn.Module]:
    """The layers of a network that ``adapter.targets`` names."""
    modules = family.networks[network].named_modules()
    adaptable = {name: part for name, part in modules if isinstance(part, nn.Linear | nn.Conv2d)}
    wanted = config.targets if network == "denoiser" else "attention"  # patterns of one's own are about the denoiser
    sites = family.sites
    readable = sites.read(network, adaptable)
    names = select("adapter.targets", wanted, sites.linears, network, readable, re.Pattern.fullmatch)
    return {name: adaptable[name] for name in names}
