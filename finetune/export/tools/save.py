"""Layers to a file of a layout, block by block, with what the header of their origin said."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from finetune import __version__
from finetune.errors import UserError, nearest
from finetune.export import kohya
from finetune.export.layers import Layer
from finetune.export.metadata import OWN
from finetune.export.names import fuses
from finetune.export.read import FORMATS
from finetune.export.stream import require_new, writing
from finetune.export.tools.source import ALPHA, Source
from finetune.family import ExportNames

_DROPPED = ("lora_adapter_metadata", "sshs_model_hash", "sshs_legacy_hash", ALPHA)  # no longer true of other tensors
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def number_type(name: str) -> torch.dtype:
    """The type of numbers of a name.

    Raises:
        UserError: there is none, or files of adapters have none of it.
    """
    if name not in DTYPES:
        raise UserError(f"there is no dtype {name!r} for adapters{nearest(name, DTYPES)}")
    return DTYPES[name]


def require_adapter_file(out: Path) -> None:
    """Refuse a path that an adapter cannot be written to.

    Raises:
        UserError: there is something already, or the suffix is another.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: adapters are written as .safetensors, not {out.suffix or 'without a suffix'}")
    require_new(out)


def save(
    out: Path,
    layout: str,
    blocks: Iterable[Sequence[Layer]],
    names: Mapping[str, ExportNames],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    alpha: float | None = None,
) -> Path:
    """Write a LoRA, whole or not at all.

    Args:
        layout: a key of ``FORMATS``.
        blocks: layers that may be one in the file come in one block.
        metadata: of the header; what it says of layers and ranks is brought up to date.
        alpha: that all layers state where the layout has alphas, and that files without any remember in their header;
            in the last case each layer's own, the rank, where it is not given.

    Raises:
        UserError: the layout has no place for DoRA's lengths, or there are no layers.
    """
    layers, ranks, alphas, convolves = 0, Counter[int](), Counter[float](), False
    with writing(out) as writer:
        for block in blocks:
            if layout == "kohya" and any(layer.magnitude is not None for layer in block):
                raise UserError("kohya's layout has no lengths that all readers of DoRA agree on; write diffusers")
            stated = [_stating(layer, alpha) for layer in block] if layout == "kohya" else block
            packed = FORMATS[layout].pack(stated, names, dtype)
            writer.add(packed)
            for layer in FORMATS[layout].unpack(packed, names):
                layers += 1
                ranks[layer.rank] += 1
                alphas[layer.alpha] += 1
                convolves = convolves or layer.down.shape[2:] not in ((), (1, 1))
        if not layers:
            raise UserError(f"{out}: no layers are left to write")
        header = {key: value for key, value in metadata.items() if key not in _DROPPED and not _of_network(key)}
        header |= {f"{OWN}version": __version__, f"{OWN}kind": "lora", f"{OWN}layout": layout}
        header[f"{OWN}layers"] = str(layers)
        if layout != "kohya":
            header |= {ALPHA: repr(alpha)} if alpha is not None else {}
        else:
            header |= _network(ranks, alphas, convolves, metadata)
        writer.metadata |= {key: value for key, value in header.items() if value}
    return out


def common_alpha(source: Source, dtype: torch.dtype) -> float | None:
    """The alpha for all layers of what is made of a file: its own where there is one that ``dtype`` holds."""
    if fuses(source.names):
        return None
    outlines = [layer for layer in source.outline.values() if isinstance(layer, Layer)]
    stated = source.alpha
    return kohya.common_alpha([replace(one, alpha=stated or one.alpha) for one in outlines], dtype)


def _stating(layer: Layer, alpha: float | None) -> Layer:
    """The same change with another alpha, whose quotient is in its up."""
    if alpha is None or layer.alpha == alpha:
        return layer
    return replace(layer, up=layer.up.float() * (layer.alpha / alpha), alpha=alpha)


def _of_network(key: str) -> bool:
    return key in ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")


def _network(
    ranks: Mapping[int, int], alphas: Mapping[float, int], convolves: bool, metadata: Mapping[str, str]
) -> dict[str, str]:
    """What kohya's tools look up."""
    rank = max(ranks, key=lambda one: (ranks[one], one))
    alpha = str(next(iter(alphas))) if len(alphas) == 1 else None
    convolution = {"conv_dim": str(rank)} | ({"conv_alpha": alpha} if alpha else {})
    found = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_args": json.dumps(convolution if convolves else {}),
    }
    return found | ({"ss_network_alpha": alpha} if alpha else {})
