"""The layout of kohya's tools, which A1111, Forge, ComfyUI and diffusers read too: ``lora_unet_<module>.alpha``.

Two rules make one file right everywhere. All layers state the same alpha, because diffusers gives attention layers
the most frequent one. Where a text encoder's attention layer is there, so are its three siblings, because readers
that fuse them drop an incomplete set; the missing ones are written as zeros.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.export.layers import Layer
from finetune.export.names import joined, parted
from finetune.family import ExportNames

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
_ATTENTION = re.compile(rf"(.*self_attn\.)({'|'.join(PROJECTIONS)})")


def recognises(keys: Iterable[str]) -> bool:
    """Whether a file with such keys has this layout."""
    return any(key.endswith(DOWN) for key in keys)


def pack(layers: Sequence[Layer], names: Mapping[str, ExportNames], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file. A layer whose alpha is not the common one has the quotient multiplied into its up."""
    whole = _complete(layers)
    alpha = common_alpha(layers, dtype)
    tensors: dict[str, Tensor] = {}
    for layer in whole:
        called = names[layer.network]
        key = f"{called.kohya}_{joined(called.missing_level + layer.module)}"
        up = layer.up if layer.alpha == alpha else layer.up.float() * (layer.alpha / alpha)
        tensors[key + DOWN] = layer.down.to(dtype)
        tensors[key + UP] = up.to(dtype)
        tensors[key + ALPHA] = torch.tensor(alpha, dtype=dtype)
    return tensors


def unpack(tensors: Mapping[str, Tensor], names: Mapping[str, ExportNames]) -> list[Layer]:
    """The layers of a file, every key read. A layer without alpha has scale 1, as in every reader.

    Raises:
        UserError: a key belongs to no layer or lacks its partner.
    """
    networks = {called.kohya: network for network, called in names.items()}
    found = []
    for key in sorted(tensors):
        stem, dot, ending = key.partition(".")
        network = next((network for prefix, network in networks.items() if stem.startswith(f"{prefix}_")), None)
        if network is None or dot + ending not in (DOWN, UP, ALPHA):
            expected = f"<{'|'.join(sorted(networks))}>_<module> and {DOWN}, {UP} or {ALPHA}"
            raise UserError(f"unknown key {key!r}; expected {expected}")
        for part in (DOWN, UP):
            if stem + part not in tensors:
                raise UserError(f"key {key!r} lacks its partner {stem + part!r}")
        if key.endswith(DOWN):
            called = names[network]
            module = parted(stem.removeprefix(f"{called.kohya}_")).removeprefix(called.missing_level)
            down, alpha = tensors[key], tensors.get(stem + ALPHA)
            scaled = float(alpha) if alpha is not None else float(down.shape[0])
            found.append(Layer(network=network, module=module, down=down, up=tensors[stem + UP], alpha=scaled))
    return found


def common_alpha(layers: Sequence[Layer], dtype: torch.dtype) -> float:
    """The alpha that a file states for all layers: the most frequent one, or the most frequent rank where ``dtype``
    cannot hold that exactly.
    """
    alpha = Counter(layer.alpha for layer in layers).most_common(1)[0][0]
    if torch.tensor(alpha, dtype=dtype).item() == alpha:
        return alpha
    return float(Counter(layer.rank for layer in layers).most_common(1)[0][0])


def incomplete(layers: Iterable[Layer]) -> dict[str, Layer]:
    """Attention layers of text encoders that are missing beside a sibling: name -> that sibling."""
    present = {layer.name: layer for layer in layers}
    missing: dict[str, Layer] = {}
    for name, layer in present.items():
        if attention := _ATTENTION.fullmatch(name):
            siblings = (attention[1] + projection for projection in PROJECTIONS)
            missing |= {sibling: layer for sibling in siblings if sibling not in present}
    return missing


def _complete(layers: Sequence[Layer]) -> list[Layer]:
    """The layers and zeros for ``incomplete`` ones. CLIP's four projections have one shape."""
    zeros = [
        replace(
            layer,
            module=name.removeprefix(f"{layer.network}."),
            down=torch.zeros_like(layer.down),
            up=torch.zeros_like(layer.up),
        )
        for name, layer in incomplete(layers).items()
    ]
    return sorted([*layers, *zeros], key=lambda layer: layer.name)
