"""What a recipe says of how the frozen base lies in memory, and what in it cannot be meant."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import Field

from finetune.config.adapters import AestheticConfig, FullConfig, LoraConfig, PivotalConfig
from finetune.config.section import Section

if TYPE_CHECKING:
    from finetune.config.schema import Recipe

Found = tuple[tuple[str | int, ...], str]
"""A key, and the rest of a sentence that begins with it."""

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)


class _Quantize(Section):
    """What all formats have in common."""

    text_encoders: bool = False
    """The text encoders' layers, too."""
    skip: list[str] = []
    """Regular expressions; layers in whose names one is found stay as they are."""


class Int8Config(_Quantize):
    """A byte a weight and a scale a row (Dettmers et al. 2022)."""

    kind: Literal["int8"]
    """Which format."""


class Fp8Config(_Quantize):
    """A float of 8 bits, e4m3 (Micikevicius et al. 2022), a weight and a scale a row."""

    kind: Literal["fp8"]
    """Which format."""


class Nf4Config(_Quantize):
    """4 bits a weight, which name a quantile of the normal distribution, and a scale for 64 (Dettmers et al. 2023)."""

    kind: Literal["nf4"]
    """Which format."""


QuantizeConfig = Annotated[Int8Config | Fp8Config | Nf4Config, Field(discriminator="kind")]


def trains_base(recipe: Recipe) -> bool:
    """Whether whole weights of the base train, which have to be float32 and in their place."""
    adapter = recipe.adapter
    return isinstance(adapter.weights if isinstance(adapter, PivotalConfig) else adapter, FullConfig)


def contradictions(recipe: Recipe) -> Iterator[Found]:
    """Everything about memory that cannot be meant."""
    model, train, adapter = recipe.model, recipe.train, recipe.adapter
    yield from _patterns(recipe)
    moved = [key for key in ("quantize", "block_swap") if getattr(model, key)]
    for key in moved:
        if trains_base(recipe):
            yield ("model", key), "is set, but weights of the base train, which have to be whole and in their place"
        part = adapter.weights if isinstance(adapter, PivotalConfig) else adapter
        if isinstance(part, LoraConfig) and part.init == "pissa":
            yield ("model", key), "is set with init: pissa, which takes the base's weights apart"
    if model.dtype != "float32":
        if trains_base(recipe):
            text = "must be float32: weights of the base train, and small steps would be lost in"
            yield ("model", "dtype"), f"{text} {model.dtype}; train.mixed_precision has its speed"
        elif train.mixed_precision not in _FITTING[model.dtype]:
            yield (
                ("train", "mixed_precision"),
                f"must be {' or '.join(_FITTING[model.dtype])} with model.dtype {model.dtype}, not "
                f"{train.mixed_precision}" + (": gradients need its loss scale" if model.dtype == "float16" else ""),
            )
    if isinstance(adapter, AestheticConfig):
        if recipe.profile:
            yield ("profile",), "has no part in an aesthetic embedding, which trains no weights"
        for key in ("dtype", "quantize", "block_swap"):
            if getattr(model, key) != type(model).model_fields[key].get_default():
                yield ("model", key), "has no part in an aesthetic embedding, whose text encoder follows each prompt"
    elif model.block_swap and not train.gradient_checkpointing:
        text = "needs train.gradient_checkpointing: without it autograd holds on to the weights of every block"
        yield ("model", "block_swap"), text


def _patterns(recipe: Recipe) -> Iterator[Found]:
    for index, pattern in enumerate(recipe.model.quantize.skip if recipe.model.quantize else []):
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            yield ("model", "quantize", "skip", index), f"must be a regular expression, not {pattern!r}: {error}"


_FITTING = {"bfloat16": ("no", "bf16"), "float16": ("fp16",)}
