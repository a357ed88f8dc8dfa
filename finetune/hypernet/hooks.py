"""Where hypernetworks sit in a U-Net: forward pre-hooks, so that any attention processor and any wrapper will do."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from finetune.errors import UserError
from finetune.hypernet.network import ROLES, Hypernetwork


def attach(denoiser: nn.Module, network: Hypernetwork) -> None:
    """Put ``network`` before the key and value layers of a U-Net, after those that are there already.

    Layers that are wrapped, as PEFT does, or unwrapped later on are followed. The network does not become a part of
    ``denoiser``: its weights are neither saved nor moved with it.

    Raises:
        UserError: the denoiser has no such layers, none of a width that the network has, or fused ones.
    """
    known = widths(denoiser)
    for width in network.widths:
        if width not in known:
            raise UserError(
                f"a hypernetwork of width {width} would never be used: keys and values of this model read "
                f"{', '.join(map(str, known))}"
            )
    chain = _CHAINS.get(denoiser)
    if chain is None:
        chain = _CHAINS[denoiser] = _Chain(denoiser)
    chain.members.append(network)
    chain.follow()


def widths(denoiser: nn.Module) -> list[int]:
    """Widths that the denoiser's key and value layers read, ascending.

    Raises:
        UserError: it has no such layers.
    """
    found = sorted({_width(getattr(attention, "to_k")) for attention in _attentions(denoiser)})  # noqa: B009
    if not found:
        raise UserError(f"{type(denoiser).__name__} has no key and value layers that a hypernetwork could change")
    return found


class _Chain:
    """The hypernetworks of one denoiser in the order in which they were attached, and their hooks."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.members: list[Hypernetwork] = []
        self._attentions = _attentions(denoiser)
        self._hooks: dict[tuple[nn.Module, str], tuple[nn.Module, Any]] = {}
        denoiser.register_forward_pre_hook(lambda *_: self.follow())

    def follow(self) -> None:
        """Make sure that the layers that are there now are the ones with hooks: a LoRA may have wrapped them."""
        changed = {width for member in self.members for width in member.widths}
        for attention in self._attentions:
            if "Fused" in type(getattr(attention, "processor", None)).__name__:  # the flag outlives the unfusing
                raise UserError("key and value layers are fused: call unfuse_qkv_projections() to use a hypernetwork")
            for role in ROLES:
                layer = getattr(attention, f"to_{role}")
                hooked, handle = self._hooks.get((attention, role), (None, None))
                if layer is hooked or _width(layer) not in changed:
                    continue
                if handle is not None:
                    handle.remove()
                self._hooks[attention, role] = (layer, layer.register_forward_pre_hook(self._hook(role)))

    def _hook(self, role: str) -> Any:
        def change(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            states, *others = inputs
            for member in self.members:
                states = member.change(role, states)
            return (states, *others)

        return change


_CHAINS: weakref.WeakKeyDictionary[nn.Module, _Chain] = weakref.WeakKeyDictionary()


def _attentions(denoiser: nn.Module) -> Sequence[nn.Module]:
    return [part for part in denoiser.modules() if all(hasattr(part, name) for name in ("to_q", "to_k", "to_v"))]


def _width(layer: Any) -> int:
    while hasattr(layer, "base_layer"):  # PEFT's wrappers
        layer = layer.base_layer
    return int(layer.in_features)
