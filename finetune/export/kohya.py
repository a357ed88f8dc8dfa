"""The layout of kohya's tools, which A1111, Forge, ComfyUI and diffusers read too: ``lora_unet_<module>.alpha``.

Two rules make one file right everywhere. All layers state the same alpha, because diffusers gives attention layers
the most frequent one. Where a text encoder's attention layer is there, so are its three siblings, because readers
that fuse them drop an incomplete set; the missing ones are written as zeros.

Where readers have one layer for several of diffusers', these are written as one (``finetune.export.fused``). Its rank
depends on how many there are, so in files of such families alpha is the rank instead, and the scale is in the numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.export.fused import diagonal, taken_apart
from finetune.export.layers import Layer
from finetune.export.names import Stems, expected_stem, fuses, network_of
from finetune.family import ExportNames
from finetune.originals import Place

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
_ATTENTION = re.compile(rf"(.*self_attn\.)({'|'.join(PROJECTIONS)})")


def recognises(keys: Iterable[str]) -> bool:
    """Whether a file with such keys has this layout."""
    return any(key.endswith(DOWN) for key in keys)


def pack(layers: Sequence[Layer], names: Mapping[str, ExportNames], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file. A layer whose alpha is not the common one has the quotient multiplied into its up.

    Alphas that are ranks are float32, which holds them all.
    """
    if fuses(names):
        return _pack_fused(layers, names, dtype)
    stems = {network: Stems(called) for network, called in names.items()}
    alpha = common_alpha(layers, dtype)
    tensors: dict[str, Tensor] = {}
    for layer in _complete(layers):
        key, _ = stems[layer.network].of(layer.module)
        up = layer.up if layer.alpha == alpha else layer.up.float() * (layer.alpha / alpha)
        tensors[key + DOWN] = layer.down.to(dtype)
        tensors[key + UP] = up.to(dtype)
        tensors[key + ALPHA] = torch.tensor(alpha, dtype=dtype)
    return tensors


def _pack_fused(layers: Sequence[Layer], names: Mapping[str, ExportNames], dtype: torch.dtype) -> dict[str, Tensor]:
    stems = {network: Stems(called) for network, called in names.items()}
    together: dict[str, list[tuple[Place, Layer]]] = {}
    for layer in _complete(layers):
        key, place = stems[layer.network].of(layer.module)
        together.setdefault(key, []).append((place, layer))
    tensors: dict[str, Tensor] = {}
    for key, parts in together.items():
        parts.sort(key=lambda part: part[0].first)
        places = [place for place, _ in parts]
        down = torch.cat([layer.down for _, layer in parts])
        tensors[key + DOWN] = down.to(dtype)
        tensors[key + UP] = diagonal(places, [layer.up.float() * layer.scale for _, layer in parts]).to(dtype)
        tensors[key + ALPHA] = torch.tensor(float(len(down)))
    return tensors


def unpack(tensors: Mapping[str, Tensor], names: Mapping[str, ExportNames]) -> list[Layer]:
    """The layers of a file, every key read. A layer without alpha has scale 1, as in every reader.

    Of layers that are one in the file, those that it does not change are left out.

    Raises:
        UserError: a key belongs to no layer or lacks its partner.
    """
    stems = {network: Stems(called) for network, called in names.items()}
    found: list[Layer] = []
    for key in sorted(tensors):
        stem, dot, ending = key.partition(".")
        network = network_of(stem, names)
        if network is None or dot + ending not in (DOWN, UP, ALPHA):
            expected = f"{expected_stem(names)} and {DOWN}, {UP} or {ALPHA}"
            raise UserError(f"unknown key {key!r}; expected {expected}")
        for part in (DOWN, UP):
            if stem + part not in tensors:
                raise UserError(f"key {key!r} lacks its partner {stem + part!r}")
        if key.endswith(DOWN):
            found += _layers(network, stem, stems[network].layers(stem), tensors)
    return found


def _layers(network: str, stem: str, places: Mapping[str, Place], tensors: Mapping[str, Tensor]) -> Iterator[Layer]:
    """Those of a stem, with ranks of their own where each has its own."""
    down, alpha = tensors[stem + DOWN], tensors.get(stem + ALPHA)
    scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
    if len(places) == 1 and next(iter(places.values())).alone:
        scaled = float(down.shape[0] if alpha is None else alpha)
        yield Layer(network=network, module=next(iter(places)), down=down, up=tensors[stem + UP], alpha=scaled)
        return
    for module, (up, ranks) in taken_apart(places, tensors[stem + UP]).items():
        if len(ranks):
            scaled = scale * len(ranks)
            yield Layer(network=network, module=module, down=down[ranks], up=up[:, ranks], alpha=scaled)


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
