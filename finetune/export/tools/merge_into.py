"""Adapters put into a model for good: a diffusers folder whose weights are the base's and what the adapters change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.config.schema import ModelConfig
from finetune.errors import GuardError, UserError
from finetune.export.full import rewriting, weight_files
from finetune.export.layers import Layer
from finetune.export.lycoris import Change
from finetune.export.stream import require_new, tensors_of
from finetune.export.tools import combine
from finetune.export.tools.merge import Whole, require_equal_ranks, require_one_base, require_weights
from finetune.export.tools.method import Method, whole
from finetune.export.tools.save import number_type
from finetune.export.tools.source import Source
from finetune.family import ExportNames


@dataclass(frozen=True)
class Baked:
    """What was written, and how many of the model's weights were changed."""

    path: Path
    weights: int


def merge_into(
    paths: Sequence[Path], model: str, out: Path, method: Method, *, strength: float = 1.0, dtype: str | None = None
) -> Baked:
    """Write a model whose weights are ``W + strength * D``, ``D`` the merged change, computed in float32.

    ``D`` is whole: nothing is cut off at a rank. LoHa, LoKr, OFT, DoRA and whole differences are merged by the methods
    of an exact sum alone (concat, svd); of several adapters with DoRA or OFT among them, what each would do alone is
    added.

    Args:
        model: as in a recipe's ``model.path``.
        dtype: of the model's numbers; as they are where it is not given.

    Raises:
        UserError: an adapter has a layer that the model has not, or of another shape, or does not fit the method.
        GuardError: the written weights are not what they should be.
    """
    from finetune.families import load_family

    require_new(out)
    family = load_family(ModelConfig(path=model))
    sources = [Source(path, model) for path in paths]
    require_weights(sources, method)
    require_one_base(sources, model)
    _require_fitting(sources, method, strength)
    changed = _changed(sources, method, strength)
    wanted = {f"{name}.weight" for source in sources for name in source}
    numbers = number_type(dtype) if dtype else None
    merged: set[str] = set()

    def put(name: str, old: Tensor) -> Tensor:
        if name not in wanted:
            return old
        merged.add(name)
        return changed(name.removesuffix(".weight"), old).to(numbers or old.dtype)

    with rewriting(family.folder, out, family.export_names, put, numbers) as folder:
        if missing := sorted(wanted - merged):
            raise UserError(f"{model}: has no weight {missing[0]}, one of {len(missing)} that the adapters change")
        _check(family.folder, folder, family.export_names, put)
    return Baked(out, len(merged))


def _require_fitting(sources: Sequence[Source], method: Method, strength: float) -> None:
    for source, weight in zip(sources, method.weights, strict=True):
        outline = list(source.outline.values())
        if method.name not in ("concat", "svd") and not all(_plain(layer) for layer in outline):
            raise UserError(f"{source.path}: is no plain LoRA; of others whole changes are added (concat)")
        turns = any(isinstance(layer, Change) and layer.algorithm == "oft" for layer in outline)
        if turns and weight * strength != 1.0:
            raise UserError(f"{source.path}: rotates weights, which has no strength but 1, not {weight * strength:g}")
    if method.name == "sum":
        require_equal_ranks(sources)


def _changed(sources: Sequence[Source], method: Method, strength: float) -> Callable[[str, Tensor], Tensor]:
    """What becomes of a weight of a name, float32."""
    if method.name in ("concat", "svd"):
        change = None
    elif method.name == "sum":
        change = _added(sources, method)
    else:
        change = whole(method, [Whole(source) for source in sources])

    shares = list(zip(sources, method.weights, strict=True))

    def changed(name: str, weight: Tensor) -> Tensor:
        held = [(source.get(name), share) for source, share in shares if name in source]
        try:
            if change is not None:
                return weight.float() + strength * change(name)
            if len(held) == 1:
                return held[0][0].changed(weight, strength * held[0][1])
            moved = [share * _difference(one, weight) for one, share in held]
            return weight.float() + strength * torch.stack(moved).sum(0)
        except (RuntimeError, GuardError) as error:
            raise UserError(
                f"{name}: the model's weight is {list(weight.shape)}, which does not fit: {error}"
            ) from error

    return changed


def _added(sources: Sequence[Source], method: Method) -> Callable[[str], Tensor]:
    def change(name: str) -> Tensor:
        held = [
            (source.layer(name), share) for source, share in zip(sources, method.weights, strict=True) if name in source
        ]
        return combine.added([layer for layer, _ in held], [share for _, share in held]).delta()

    return change


def _difference(one: Layer | Change, weight: Tensor) -> Tensor:
    """What an adapter alone does to a weight."""
    return one.delta() if isinstance(one, Layer) and _plain(one) else one.changed(weight) - weight.float()


def _plain(layer: Layer | Change) -> bool:
    return isinstance(layer, Layer) and layer.magnitude is None


def _check(base: Path, folder: Path, names: Mapping[str, ExportNames], put: Callable[[str, Tensor], Tensor]) -> None:
    """Whether what was written is, bit for bit, what it should be."""
    for network, called in names.items():
        for old, new in zip(
            weight_files(base / called.diffusers), weight_files(folder / called.diffusers), strict=True
        ):
            for (key, before), (_, after) in zip(tensors_of(old), tensors_of(new), strict=True):
                name = f"{network}.{key.removeprefix(called.missing_level)}"
                if not torch.equal(put(name, before).to(after.dtype), after):
                    raise GuardError(f"{folder}: {name} reads back differently from what was merged")
