"""A training step on skeletons: how much memory it would take at a time, without computing a single number.

Every tensor of the meta device has a size and a lifetime like a real one. So a forward and a backward pass is run, and
what is alive is counted: activations, their gradients, what checkpointing computes again, gradients of weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Live(TorchDispatchMode):
    """Inside, counts the bytes of tensors that are made.

    Attributes:
        now: of those that are alive.
        peak: the most that were at a time.

    Args:
        there: a module whose tensors are there before and do not count.
    """

    def __init__(self, there: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        tensors = [*there.parameters(), *there.buffers(), *(p.grad for p in there.parameters() if p.grad is not None)]
        self._there = [tensor.untyped_storage() for tensor in tensors]  # held on to, or an address may come again
        self._known = {storage._cdata for storage in self._there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, made)
        return made

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return tensor

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


_LOWER = ((F, "linear"), (F, "conv2d"), (F, "conv3d"), (torch, "matmul"), (torch, "bmm"), (torch, "baddbmm"))
_UPPER = ((F, "layer_norm"), (F, "group_norm"), (F, "softmax"), (F, "rms_norm"))
"""What ``torch.autocast`` on a GPU runs in 16 bits and in float32, of what networks are made of."""


@contextmanager
def skeletal(autocast: torch.dtype | None = None) -> Iterator[None]:
    """Inside, new tensors are skeletons, and attention takes what the fused kernels of real devices do.

    Functions are replaced and no mode of torch is entered, because modes are not seen by what checkpointing runs again
    in a backward pass.

    Args:
        autocast: what ``torch.autocast`` casts to, which the meta device does not have.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.device("meta"))
        stack.enter_context(_replaced(F, "scaled_dot_product_attention", lambda _: _attention(autocast)))
        if autocast is not None:
            for places, dtype in ((_LOWER, autocast), (_UPPER, torch.float32)):
                for owner, name in places:
                    stack.enter_context(_replaced(owner, name, partial(_casting, dtype)))
        yield


@contextmanager
def _replaced(owner: Any, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    real = getattr(owner, name)
    setattr(owner, name, change(real))
    try:
        yield
    finally:
        setattr(owner, name, real)


def _casting(dtype: torch.dtype, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def cast(*arguments: Any, **named: Any) -> Tensor:
        return function(*(_cast(one, dtype) for one in arguments), **{k: _cast(one, dtype) for k, one in named.items()})

    return cast


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _attention(autocast: torch.dtype | None) -> Callable[..., Tensor]:
    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        found: Tensor = _Attention.apply(*(_cast(one, autocast or one.dtype) for one in (query, key, value)))
        return found

    return attention


def step_bytes(
    networks: nn.Module, forward: Callable[[], Tensor], autocast: torch.dtype | None, accumulated: bool
) -> int:
    """The most that a forward and a backward pass hold at a time, with the gradients that they leave.

    Args:
        networks: in the modes and with the adapters of training.
        forward: gives what is differentiated, any shape.
        accumulated: gradients of an earlier pass are there already.
    """
    trained = [parameter for parameter in networks.parameters() if parameter.requires_grad]
    with skeletal(autocast), Live(networks) as live:
        for _ in range(2 if accumulated else 1):
            forward().sum().backward()
    for parameter in trained:
        parameter.grad = None
    return live.peak


@torch.no_grad()
def inference_bytes(networks: nn.Module, forward: Callable[[], Any]) -> int:
    """The most that a pass without gradients holds at a time."""
    with skeletal(), Live(networks) as live:
        forward()
    return live.peak


class _Attention(torch.autograd.Function):
    """The shapes of fused attention, and what it keeps: its inputs and its output, never the L x S matrix."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
