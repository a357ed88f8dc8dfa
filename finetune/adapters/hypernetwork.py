"""Hypernetworks: small networks that change what keys and values of attention read (A1111's web UI, NovelAI 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

from torch import Tensor

from finetune.adapter import Adapter, ParameterGroup, Weights
from finetune.config.adapters import HypernetworkConfig
from finetune.errors import UserError
from finetune.family import ModelFamily, without_hypernetworks
from finetune.hypernet import Hypernetwork, Structure, attach, initialise, widths

NETWORK = "hypernetwork"


class Hypernetworks(Adapter):
    """A pair of small networks for each width that the denoiser's keys and values read; all of the base is frozen.

    They are kept in ``family.networks["hypernetwork"]`` in float32, outside of the denoiser, which calls them through
    hooks. While they train, their strength is always 1.

    Raises:
        UserError: the architecture has no such layers, or the denoiser none of a width that is asked for.
    """

    kind: ClassVar[str] = "hypernetwork"

    def __init__(self, config: HypernetworkConfig, family: ModelFamily, seed: int) -> None:
        if why := without_hypernetworks(family.sites.readers, family.components["denoiser"]):
            raise UserError(f"adapter.kind: hypernetwork has no place in {family.name}: {why}")
        self.config = config
        family.require("denoiser")
        family.networks.requires_grad_(False)
        denoiser = family.networks["denoiser"]
        try:
            self.network = Hypernetwork(structure(config), config.sizes or widths(denoiser))
            attach(denoiser, self.network)
        except UserError as error:
            raise UserError(f"adapter: {error}") from error
        initialise(self.network, config.init, seed, config.zero_last)
        self.network.to(next(denoiser.parameters()).device)
        family.networks[NETWORK] = self.network

    def groups(self) -> list[ParameterGroup]:
        """One, of all parameters."""
        named = {f"{NETWORK}.{name}": parameter for name, parameter in self.network.named_parameters()}
        return [ParameterGroup(NETWORK, named)]

    def networks(self) -> frozenset[str]:
        """The hypernetwork alone; the denoiser stays as it is."""
        return frozenset({NETWORK})

    def weights(self) -> Weights:
        """``hypernetwork.<width>.<k or v>.linear.<place>.weight`` and ``.bias``; a place counts every module."""
        tensors = {f"{NETWORK}.{name}": p.detach().cpu().clone() for name, p in self.network.named_parameters()}
        return Weights(self.kind, tensors, self.network.structure.as_text() | {"init": self.config.init})

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put ``weights().tensors`` back, bit for bit.

        Raises:
            UserError: a tensor is missing, unknown or of another shape.
        """
        self.network.load({name.removeprefix(f"{NETWORK}."): tensor for name, tensor in tensors.items()})

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the denoiser answers as without hypernetworks, bit for bit."""
        before, self.network.enabled = self.network.enabled, False
        try:
            yield
        finally:
            self.network.enabled = before


def structure(config: HypernetworkConfig) -> Structure:
    """What a recipe's section describes."""
    return Structure(
        layers=tuple(config.layers),
        activation=config.activation,
        activate_output=config.activate_output,
        layer_norm=config.layer_norm,
        dropout=tuple(config.dropout or ()),
    )
