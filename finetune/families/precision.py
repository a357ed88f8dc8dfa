"""The border of a network in half precision: what comes in is cast, and what goes out is float32."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def cast_at_border(network: nn.Module) -> None:
    """Let ``network`` take float32 and answer in float32, whatever its weights are.

    Times, scales of guidance and ids are left as they are: a half of 16 bits cannot tell step 999 from step 1000, nor
    1367 pixels from 1368, and networks cast what they make of them.
    """
    names = [name for name in inspect.signature(network.forward).parameters]

    def take(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        dtype = _dtype(module)
        placed = tuple(_cast(name, value, dtype) for name, value in zip(names, arguments, strict=False))
        return placed, {name: _cast(name, value, dtype) for name, value in named.items()}

    network.register_forward_pre_hook(take, with_kwargs=True)
    network.register_forward_hook(lambda _, __, answer: _float(answer))


def cast_inputs(network: nn.Module) -> None:
    """Let the parts of an autoencoder take what they are given by pipelines, which know of one dtype alone."""
    for part in network.children():
        part.register_forward_pre_hook(lambda own, inputs: (_cast("", inputs[0], _dtype(own)), *inputs[1:]))


def _dtype(module: nn.Module) -> torch.dtype:
    return next(one.dtype for one in module.parameters() if one.is_floating_point() and one.dtype.itemsize > 1)


def _cast(name: str, value: Any, dtype: torch.dtype) -> Any:
    """``value`` with its states in ``dtype``; ``name`` is that of an argument or of a key in one."""
    match value:
        case Tensor():
            state = value.is_floating_point() and value.ndim > 1 and not name.endswith("_ids")
            return value.to(dtype) if state else value
        case dict():
            return {key: _cast(key, inner, dtype) for key, inner in value.items()}
        case list() | tuple():
            return type(value)(_cast(name, inner, dtype) for inner in value)
    return value


def _float(answer: Any) -> Any:
    """An answer of diffusers, a tuple or an output with ``sample``, in float32."""
    match answer:
        case Tensor():
            return answer.float() if answer.is_floating_point() else answer
        case tuple() | list():
            return type(answer)(_float(one) for one in answer)
    if hasattr(answer, "sample"):
        answer.sample = _float(answer.sample)
    return answer
