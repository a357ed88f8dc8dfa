"""Whole weights of the base, all of them or a selection.

With ``detach_start`` as Custom Diffusion trains them (Kumari et al. 2023, https://arxiv.org/abs/2212.04488): of the
layers that read the prompt, key and value of the start token pass no gradient. It stands in every prompt, so whatever
one concept taught there would change all pictures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from finetune.adapter import Adapter, ParameterGroup, Weights
from finetune.adapters.select import check_same, networks, select
from finetune.config.adapters import FullConfig
from finetune.errors import UserError
from finetune.family import ModelFamily, Unsupported


class Full(Adapter):
    """Selected parameters of a family's networks, everything else frozen.

    ``parameters`` holds them by canonical name, ``<network>.<parameter>``. Train them in float32: in half precision
    small updates round to nothing.

    Raises:
        UserError: a selection matches no parameter, or the start token was to be detached in an architecture without
            one.
    """

    kind: ClassVar[str] = "full"

    def __init__(self, config: FullConfig, family: ModelFamily, seed: int = 0) -> None:
        self.config = config
        self.family = family
        self.parameters: dict[str, nn.Parameter] = {}
        self._original: dict[str, Tensor] | None = None
        self._shared = False
        readers = _readers(family) if config.detach_start else None
        denoiser, *text_encoders = trained = networks(family, config.text_encoder)
        family.require(*trained)
        family.networks.requires_grad_(False)
        self._select(denoiser, config.select)
        for network in text_encoders:
            # patterns of one's own are about the denoiser
            self._select(network, config.select if config.select in family.sites.selections else "all")
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        if readers:
            _detach_start(family, readers)

    def _select(self, network: str, wanted: str | list[str]) -> None:
        named = dict(self.family.networks[network].named_parameters())
        sites = self.family.sites
        names = sites.read(network, named)
        chosen = select("adapter.select", wanted, sites.selections, network, names, re.Pattern.search)
        self.parameters |= {f"{network}.{name}": named[name] for name in chosen}

    def groups(self) -> list[ParameterGroup]:
        """The denoiser's parameters, then those of each text encoder with its own learning rate."""
        groups: dict[str, dict[str, nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            groups.setdefault(name.split(".")[0], {})[name] = parameter
        rate = self.config.text_encoder_learning_rate
        return [
            ParameterGroup(network, parameters, None if network == "denoiser" else rate, tables=self._tables(network))
            for network, parameters in groups.items()
        ]

    def _tables(self, network: str) -> frozenset[str]:
        """Weights of embeddings, of words and of their places."""
        modules = self.family.networks[network].named_modules()
        return frozenset(f"{network}.{name}.weight" for name, module in modules if isinstance(module, nn.Embedding))

    def networks(self) -> frozenset[str]:
        """The networks that hold trained parameters."""
        return frozenset(name.split(".")[0] for name in self.parameters)

    def weights(self) -> Weights:
        """The trained parameters only."""
        tensors = {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}
        chosen = self.config.select
        settings = {
            "select": chosen if isinstance(chosen, str) else json.dumps(chosen),
            "text_encoder": json.dumps(self.config.text_encoder),
        }
        if self.config.detach_start:
            settings["detach_start"] = "true"
        return Weights(self.kind, tensors, settings)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put ``weights().tensors`` back, bit for bit.

        Raises:
            UserError: a tensor is missing, unknown or of another shape.
        """
        check_same(self.parameters, tensors)
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])

    def share_networks(self) -> None:
        """From here on there is no room for a second set of weights."""
        self._shared = True

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the networks hold the weights of the base as they are on disk. Only under ``torch.no_grad()``.

        A second copy of the trained weights is read when this is first entered and kept from then on.

        Raises:
            RuntimeError: gradients are enabled; a backward pass would mix the two sets of weights.
            UserError: processes hold the weights in pieces.
        """
        if self._shared:
            raise UserError(
                "prior.kind: 'model' with whole weights does not work where processes hold the networks in pieces "
                "(ZeRO-3, FSDP2); take images, or zero2"
            )
        if torch.is_grad_enabled():
            raise RuntimeError("the untouched weights may be used under torch.no_grad() only")
        if self._original is None:
            self._original = self._read_original()
        trained = {name: parameter.data for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.data = self._original[name]
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = trained[name]

    def _read_original(self) -> dict[str, Tensor]:
        original: dict[str, Tensor] = {}
        for network in self.networks():
            copy = self.family.fresh(network)
            original |= {f"{network}.{name}": tensor.data for name, tensor in copy.named_parameters()}
        return {name: original[name].to(parameter) for name, parameter in self.parameters.items()}


def _readers(family: ModelFamily) -> tuple[str, str]:
    readers = family.sites.readers
    if isinstance(readers, Unsupported):
        raise UserError(f"adapter.detach_start: {family.name} has no place for it: {readers.reason}")
    return readers


def _detach_start(family: ModelFamily, readers: tuple[str, str]) -> None:
    """Let no gradient through what the layers that read the prompt make of its first token. Answers stay the same."""
    for name, layer in family.networks["denoiser"].named_modules():
        if name.endswith(readers):
            layer.register_forward_hook(_without_start)


def _without_start(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    """Keys or values [B, T, D] whose first of T is a constant to the backward pass."""
    if not output.requires_grad:
        return None
    return torch.cat((output[:, :1].detach(), output[:, 1:]), dim=1)
