"""LyCORIS' layout of LoHa, LoKr and whole differences, which ComfyUI, Forge and A1111 read:
``lora_unet_<module>.hada_w1_a``, ``.lokr_w1``, ``.diff``, and ``.alpha``.

Their rule for alpha: LoHa is scaled by ``alpha / rank``; LoKr too, but by nothing where both of its factors are whole;
differences are not scaled.

Where readers have one layer for several of diffusers', LoHa's factors become blocks as LoRA's do, because the product
of ``diag(A_q, A_k)`` and ``[B_q; B_k]`` is ``[A_q B_q; A_k B_k]``. Kronecker products cannot be put together so: there
LoKr's whole difference is written, as large as the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.export.fused import diagonal, taken_apart
from finetune.export.lycoris import PARTS, Change
from finetune.export.names import Stems, expected_stem, network_of
from finetune.family import ExportNames
from finetune.originals import Place
from finetune.originals.tensors import stack

ALPHA = "alpha"
_KNOWN = {part: algorithm for algorithm in ("loha", "lokr", "full") for part in PARTS[algorithm]}


def algorithm_of(keys: Iterable[str]) -> str | None:
    """Which of them a file with such keys holds; None for any other file. Beside layers of LoKr there may be whole
    differences.
    """
    found = {_KNOWN[part] for key in keys if (part := key.partition(".")[2]) in _KNOWN}
    return next((name for name in ("loha", "lokr", "full") if name in found), None)


def pack(changes: Sequence[Change], names: Mapping[str, ExportNames], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file. Where readers do not scale, the scale is multiplied into the first factor of LoKr.

    Alphas are float32: an odd one would be rounded by half precision, and with it every change.
    """
    stems = {network: Stems(called) for network, called in names.items()}
    together: dict[str, list[tuple[Place, Change]]] = {}
    for change in changes:
        stem, place = stems[change.network].of(change.module)
        together.setdefault(stem, []).append((place, change))
    tensors: dict[str, Tensor] = {}
    for stem, parts in together.items():
        alone = len(parts) == 1 and parts[0][0].alone
        for part, tensor in (_alone(parts[0][1]) if alone else _fused(parts)).items():
            tensors[f"{stem}.{part}"] = tensor.to(torch.float32 if part == ALPHA else dtype)
    return tensors


def _alone(change: Change) -> dict[str, Tensor]:
    """The parts of a layer."""
    parts = dict(change.parts)
    if change.algorithm == "full":
        return parts
    if "lokr_w1" in parts and change.rank is None:
        parts["lokr_w1"] = parts["lokr_w1"].float() * change.scale
    # an alpha that nobody reads is 1
    return parts | {ALPHA: torch.tensor(change.scale * change.rank if change.rank else 1.0)}


def _fused(parts: Sequence[tuple[Place, Change]]) -> dict[str, Tensor]:
    """The parts of layers that are one; the first layer's scale is that of all."""
    places, found = [place for place, _ in parts], [change for _, change in parts]
    if any(change.algorithm != "loha" for change in found):
        return {"diff": stack(places, [change.difference() for change in found])}
    made: dict[str, Tensor] = {}
    for number in (1, 2):
        outer, inner = f"hada_w{number}_a", f"hada_w{number}_b"
        folded = [change.scale / found[0].scale if number == 1 else 1.0 for change in found]
        blocks = [change.parts[outer].float() * share for change, share in zip(found, folded, strict=True)]
        made[outer] = diagonal(places, blocks)
        made[inner] = torch.cat([change.parts[inner] for change in found])
    return made | {ALPHA: torch.tensor(found[0].scale * len(made["hada_w1_b"]))}


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
    made: list[Change] = []
    for stem, parts in found.items():
        network = network_of(stem, names) or ""
        places = stems[network].layers(stem)
        whole = _change(stem, network, next(iter(places)), parts)
        made += [whole] if len(places) == 1 and places[whole.module].alone else _taken_apart(whole, places)
    return made


def _taken_apart(whole: Change, places: Mapping[str, Place]) -> Iterator[Change]:
    """The layers that are one in a file, without those that it does not change."""
    if whole.algorithm != "loha":
        for module, (rows, _) in taken_apart(places, whole.difference()).items():
            if rows.any():
                yield replace(whole, module=module, algorithm="full", parts={"diff": rows.contiguous()}, scale=1.0)
        return
    first, second = (taken_apart(places, whole.parts[f"hada_w{number}_a"]) for number in (1, 2))
    for module in places:
        (one, ranks), (two, others) = first[module], second[module]
        if not torch.equal(ranks, others):
            ranks = torch.arange(one.shape[1])
        inner = {part: whole.parts[part][ranks] for part in ("hada_w1_b", "hada_w2_b")}
        if len(ranks):
            parts = {"hada_w1_a": one[:, ranks], "hada_w2_a": two[:, ranks], **inner}
            yield replace(whole, module=module, parts=parts)


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
