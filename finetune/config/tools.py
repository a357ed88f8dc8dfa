"""Which layout of a method's files a tool reads best, and what to do where it reads none.

The answers are what the tools' loaders do: docs/formats.md says which of them were run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from finetune.config.adapters import (
    AdapterConfig,
    FullConfig,
    HypernetworkConfig,
    LoraConfig,
    PivotalConfig,
)

Tool = Literal["diffusers", "comfyui", "a1111", "forge", "kohya", "invokeai", "stable-diffusion.cpp"]

_UIS = ("comfyui", "a1111", "forge", "invokeai", "stable-diffusion.cpp")
_LYCORIS: Mapping[str, str] = {"diffusers": "peft", **dict.fromkeys(_UIS, "kohya")}
_MODELS: Mapping[str, str] = {
    **dict.fromkeys(("diffusers", "kohya", "invokeai"), "diffusers"),
    **dict.fromkeys(("comfyui", "a1111", "forge", "stable-diffusion.cpp"), "single-file"),
}

READS: Mapping[str, Mapping[str, str]] = {
    "lora": {"diffusers": "diffusers", **dict.fromkeys((*_UIS, "kohya"), "kohya")},
    "dora": {"diffusers": "diffusers", **dict.fromkeys(_UIS, "kohya")},
    "loha": _LYCORIS,
    "lokr": _LYCORIS,
    "oft": {"diffusers": "peft"},
    "embedding": {"diffusers": "diffusers", "kohya": "diffusers", **dict.fromkeys(_UIS, "a1111")},
    "hypernetwork": {"diffusers": "diffusers", "comfyui": "a1111", "a1111": "a1111"},
    "aesthetic": {"diffusers": "diffusers", "a1111": "a1111"},
    "full": _MODELS,
    "selection": {**_MODELS, "diffusers": "delta"},
}
"""Method -> tool -> the format that it reads best. Formats are those of ``export.formats``."""

_INSTEAD: Mapping[str, str] = {
    "dora": "ignores the lengths of DoRA; it reads the LoRA that use_dora: false trains",
    "loha": "reads no LyCORIS without its module; it reads kind: lora",
    "lokr": "reads no LyCORIS without its module; it reads kind: lora",
    "oft": "reads no rotations of inputs; it reads kind: {lora}",
    "hypernetwork": "draws with no hypernetworks; comfyui and a1111 do, and it reads kind: lora",
    "aesthetic": "reads no aesthetic embeddings; it reads the LoRA that bake_prompts makes of one",
}
"""Method -> what a tool that is not in ``READS`` makes of it, and the nearest that it does read."""


def methods(adapter: AdapterConfig) -> tuple[str, ...]:
    """The keys of ``READS`` for each part of an adapter that is in files of its own."""
    match adapter:
        case PivotalConfig():
            return (*methods(adapter.weights), *methods(adapter.embedding))
        case LoraConfig():
            return ("dora" if adapter.use_dora else "lora",)
        case FullConfig():
            return ("full" if adapter.select == "all" else "selection",)
    return (adapter.kind,)


def formats(tools: Sequence[str], method: str) -> tuple[str, ...]:
    """The formats that ``tools`` need of a method, each once."""
    return tuple(dict.fromkeys(READS[method][tool] for tool in tools if tool in READS[method]))


def objections(tools: Sequence[str], adapter: AdapterConfig) -> Iterator[tuple[int, str]]:
    """Tools, by their place, that cannot read what an adapter trains, and what can be done about it."""
    for place, tool in enumerate(tools):
        for method in methods(adapter):
            if tool not in READS[method]:
                lora = "lora" if tool == "kohya" else "lora, loha or lokr"
                yield place, f"holds {tool}, which {_INSTEAD[method].format(lora=lora)}"
        if tool == "comfyui" and isinstance(adapter, HypernetworkConfig):
            yield from ((place, f"holds comfyui, which {why}") for why in _comfyui(adapter))


COMFYUI = {"linear", "relu", "leakyrelu", "elu", "swish", "tanh", "sigmoid", "softsign", "mish"}
"""Activations of hypernetworks that ComfyUI knows."""


def _comfyui(adapter: HypernetworkConfig) -> Iterator[str]:
    """Settings of hypernetworks that it does not read as A1111 does."""
    if adapter.activation not in COMFYUI:
        yield f"knows no activation {adapter.activation!r}; it knows {', '.join(sorted(COMFYUI))}"
    elif adapter.layer_norm and adapter.activation != "linear" and not adapter.activate_output:
        yield "puts an activation before the last layer norm; with activate_output: true it reads what is trained"
