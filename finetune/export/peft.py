"""The layout of diffusers and PEFT: ``unet.<module>.lora_A.weight``, ``text_encoder.text_model.<module>…``.

It has no alpha: loaders take ``alpha = rank``, so the scale is multiplied into ``lora_B``. Ranks may differ. DoRA's
magnitudes are ``….lora_magnitude_vector.weight``: without the ``.weight`` those of text encoders would be skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from finetune.errors import UserError, nearest
from finetune.export.layers import DOWN, MAGNITUDE, UP, Layer
from finetune.family import ExportNames


def recognises(keys: Iterable[str]) -> bool:
    """Whether a file with such keys has this layout."""
    return any(key.endswith(DOWN) for key in keys)


def pack(layers: Sequence[Layer], names: Mapping[str, ExportNames], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file.

    The product of scale and ``lora_B`` is exact, bit for bit, where ``alpha / rank`` is a power of two.
    """
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        called = names[layer.network]
        key = f"{called.diffusers}.{called.missing_level}{layer.module}"
        tensors[key + DOWN] = layer.down.to(dtype)
        tensors[key + UP] = (layer.up.float() * layer.scale).to(dtype)
        if layer.magnitude is not None:
            tensors[key + MAGNITUDE] = layer.magnitude.to(dtype)
    return tensors


def unpack(tensors: Mapping[str, Tensor], names: Mapping[str, ExportNames]) -> list[Layer]:
    """The layers of a file, every key read.

    Raises:
        UserError: a key belongs to no layer or lacks its partner.
    """
    networks = {called.diffusers: network for network, called in names.items()}
    found = []
    for key in sorted(tensors):
        stem = key.removesuffix(DOWN).removesuffix(UP).removesuffix(MAGNITUDE)
        component, _, module = stem.partition(".")
        if stem == key or component not in networks or not module:
            expected = f"<{'|'.join(sorted(networks))}>.<module>{DOWN}, {UP} or {MAGNITUDE}"
            raise UserError(f"unknown key {key!r}; expected {expected}{_hint(component, networks)}")
        partner = stem + (UP if key.endswith(DOWN) else DOWN)
        if partner not in tensors:
            raise UserError(f"key {key!r} lacks its partner {partner!r}")
        if key.endswith(DOWN):
            network = networks[component]
            module = module.removeprefix(names[network].missing_level)
            found.append(
                Layer(
                    network=network,
                    module=module,
                    down=tensors[key],
                    up=tensors[partner],
                    alpha=float(tensors[key].shape[0]),
                    magnitude=tensors.get(stem + MAGNITUDE),
                )
            )
    return found


def _hint(component: str, known: Iterable[str]) -> str:
    return nearest(component, known) if component not in known else ""
