"""LyCORIS' layout of LoHa, LoKr and whole differences, which ComfyUI, Forge and A1111 read:
``lora_unet_<module>.hada_w1_a``, ``.lokr_w1``, ``.diff``, and ``.alpha``.

Their rule for alpha: LoHa is scaled by ``alpha / rank``; LoKr too, but by nothing where both of its factors are whole;
differences are not scaled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.export.lycoris import PARTS, Change
from finetune.export.names import Stems, expected_stem, network_of
from finetune.family import ExportNames

ALPHA = "alpha"
_KNOWN = {part: algorithm for algorithm in ("loha", "lokr", "full") for part in PARTS[algorithm]}


def algorithm_of(keys: Iterable[str]) -> str | None:
    """Which of them a file with such keys holds; None for any other file."""
    return next((_KNOWN[part] for key in keys if (part := key.partition(".")[2]) in _KNOWN), None)


def pack(changes: Sequence[Change], names: Mapping[str, ExportNames], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file. Where readers do not scale, the scale is multiplied into the first factor of LoKr.

    Alphas are float32: an odd one would be rounded by half precision, and with it every change.
    """
    stems = {network: Stems(called) for network, called in names.items()}
    tensors: dict[str, Tensor] = {}
    for change in changes:
        stem, _ = stems[change.network].of(change.module)
        for part, tensor in change.parts.items():
            folded = part == "lokr_w1" and change.rank is None
            tensors[f"{stem}.{part}"] = (tensor.float() * change.scale if folded else tensor).to(dtype)
        if change.algorithm != "full":  # an alpha that nobody reads is 1
            alpha = change.scale * change.rank if change.rank else 1.0
            tensors[f"{stem}.{ALPHA}"] = torch.tensor(alpha, dtype=torch.float32)
    return tensors


def unpack(tensors: Mapping[str, Tensor], names: Mapping[str, ExportNames]) -> list[Change]:
    """The layers of a file, every key read, scaled as the readers scale.

    Raises:
        UserError: a key belongs to no layer, or a layer lacks a part.
    """
    stems = {network: Stems(called) for network, called in names.items()}
    found: dict[str, dict[str, Tensor]] = {}
    for key in sorted(tensors):
        stem, _, part = key.partition(".")
        if network_of(stem, names) is None or part not in (*_KNOWN, ALPHA):
            expected = f"{expected_stem(names)}.<{'|'.join((*_KNOWN, ALPHA))}>"
            raise UserError(f"unknown key {key!r}; expected {expected}")
        found.setdefault(stem, {})[part] = tensors[key]
    made = []
    for stem, parts in found.items():
        network = network_of(stem, names) or ""
        (module,) = stems[network].layers(stem)
        made.append(_change(stem, network, module, parts))
    return made


def _change(stem: str, network: str, module: str, parts: dict[str, Tensor]) -> Change:
    alpha = parts.pop(ALPHA, None)
    algorithms = {_KNOWN[part] for part in parts}
    if len(algorithms) != 1:
        raise UserError(f"{stem}: holds {', '.join(parts) or 'no part'} beside alpha, which is no layer of one kind")
    algorithm = algorithms.pop()
    if lacks := _lacking(algorithm, set(parts)):
        raise UserError(f"{stem}: lacks {lacks}")
    change = Change(network=network, module=module, algorithm=algorithm, parts=parts)
    if alpha is None or change.rank is None:
        return change
    return Change(network=network, module=module, algorithm=algorithm, parts=parts, scale=float(alpha) / change.rank)


def _lacking(algorithm: str, parts: set[str]) -> str | None:
    """A part without which the others make no change."""
    if algorithm != "lokr":
        return next((part for part in PARTS[algorithm] if part not in parts), None)
    for factor in ("lokr_w1", "lokr_w2"):
        if factor not in parts and not {f"{factor}_a", f"{factor}_b"} <= parts:
            return factor
    return None
