"""Several LoRAs as one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.export.layers import Layer
from finetune.export.metadata import OWN
from finetune.export.tools import combine
from finetune.export.tools.lowrank import Rule, cut, recut, total_kept
from finetune.export.tools.method import FACTORS, Method, whole
from finetune.export.tools.save import number_type, require_adapter_file, save
from finetune.export.tools.source import Source, groups

_OF_A_BASE = ("ss_base_model_version", "modelspec.architecture")
_OF_A_RUN = (f"{OWN}steps", f"{OWN}seed", f"{OWN}objective", "modelspec.usage_hint")
_PHRASE = "modelspec.trigger_phrase"


@dataclass(frozen=True)
class Merged:
    """What was written, and the share of the merged change's squares that is in it: 1 where nothing was cut off."""

    path: Path
    kept: float


def merge(
    paths: Sequence[Path],
    out: Path,
    method: Method,
    *,
    to: str | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    base: str | None = None,
) -> Merged:
    """Merge LoRAs of one base model. A layer that not all of them have is merged from those that do.

    Args:
        to: layout, "diffusers" or "kohya"; the first file's where it is not given.
        rank: of the methods that cut off; the largest of the files' where it is not given.
        dtype: of the numbers; the widest of the files' where it is not given.
        base: as in a recipe's ``model.path``; what the files say where it is not given.

    Raises:
        UserError: the files are not LoRAs of one base, hold DoRA, whose changes do not add up, or their ranks or
            shapes do not fit the method.
    """
    require_adapter_file(out)
    if rank is not None and method.name in FACTORS:
        raise UserError(f"rank {rank} has no part in {method.name}, which cuts nothing off; svd is the sum at a rank")
    sources = [Source(path, base) for path in paths]
    _require_fitting(sources, method, base)
    to = to or ("kohya" if sources[0].layout == "kohya" else "diffusers")
    numbers = number_type(dtype) if dtype else _widest([source.dtype for source in sources])
    names = sorted({name for source in sources for name in source})
    kept: list[tuple[float, float]] = []
    blocks = _blocks(sources, names, method, rank, kept)
    header = _header(sources, method)
    save(out, to, blocks, sources[0].names, numbers, header, _alpha(sources, names, method, rank))
    return Merged(out, total_kept(kept))


def require_one_base(sources: Sequence[Source], base: str | None) -> None:
    """Refuse files of different base models, unless one is named for all.

    Raises:
        UserError: naming the two files and what they say.
    """
    first = sources[0]
    for source in sources[1:]:
        if source.names is not first.names and {*source.names} != {*first.names}:
            raise UserError(f"{first.path} and {source.path} are for models of different kinds")
        for key in (f"{OWN}base", *_OF_A_BASE):
            said = [one.metadata.get(key) for one in (first, source)]
            if base is None and all(said) and said[0] != said[1]:
                raise UserError(
                    f"{first.path} was trained on {said[0]} and {source.path} on {said[1]} ({key}); name the base of "
                    "both with --base"
                )
    for source in sources:
        for name in source:
            one, other = source.outline[name], next(one for one in sources if name in one).outline[name]
            if isinstance(one, Layer) and isinstance(other, Layer) and _shape(one) != _shape(other):
                raise UserError(
                    f"{name} changes a weight {_shape(other)} in {first.path}, {_shape(one)} in {source.path}"
                )


class Whole:
    """Whole changes of a LoRA by the names of layers."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __contains__(self, name: object) -> bool:
        return name in self._source

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def change(self, name: str) -> Tensor:
        """float32 [out, in, ...]."""
        return self._source.layer(name).delta()


def require_weights(sources: Sequence[Source], method: Method) -> None:
    """Refuse other numbers of adapters and weights.

    Raises:
        UserError: naming both.
    """
    if len(sources) != len(method.weights):
        raise UserError(f"{len(sources)} adapters, but {len(method.weights)} weights; there must be one for each")


def require_equal_ranks(sources: Sequence[Source]) -> None:
    """Refuse files whose factors cannot be added.

    Raises:
        UserError: naming the layer, the ranks and the files.
    """
    for name in sorted({name for source in sources for name in source}):
        ranks = {source.path: _outline(source, name).rank for source in sources if name in source}
        if len(set(ranks.values())) > 1:
            said = ", ".join(f"{rank} in {path}" for path, rank in ranks.items())
            raise UserError(f"{name} has rank {said}; factors of one rank can be added, others take concat or svd")


def _require_fitting(sources: Sequence[Source], method: Method, base: str | None) -> None:
    require_weights(sources, method)
    for source in sources:
        if source.kind != "lora":
            raise UserError(f"{source.path}: is {source.kind}, which can be merged into a model alone (--into)")
        for layer in source.outline.values():
            if isinstance(layer, Layer) and layer.magnitude is not None:
                raise UserError(f"{source.path}: is DoRA, whose changes do not add up; merge it into a model (--into)")
    require_one_base(sources, base)
    if method.name == "sum":
        require_equal_ranks(sources)


def _blocks(
    sources: Sequence[Source], names: Sequence[str], method: Method, rank: int | None, kept: list[tuple[float, float]]
) -> Iterator[list[Layer]]:
    if method.name not in (*FACTORS, "svd"):
        merged = whole(method, [Whole(source) for source in sources])
    for block in groups(names):
        layers = []
        for name in block:
            held = [source for source in sources if name in source]
            rule = Rule(rank=rank or max(_outline(source, name).rank for source in held))
            if method.name in (*FACTORS, "svd"):
                weights = [weight for source, weight in zip(sources, method.weights, strict=True) if name in source]
                join = combine.added if method.name == "sum" else combine.concatenated
                layer = join([source.layer(name) for source in held], weights)
                found = recut(layer, rule) if method.name == "svd" else None
            else:
                network, _, module = name.partition(".")
                found = cut(network, module, merged(name), rule)
            if found is not None:
                kept.append((found.kept, found.squares))
            layers.append(layer if found is None else found.layer)
        yield layers


def _alpha(sources: Sequence[Source], names: Sequence[str], method: Method, rank: int | None) -> float:
    """The most frequent rank, where layers come from all files."""
    ranks = [[_outline(source, name).rank for source in sources if name in source] for name in names]
    made = [sum(one) if method.name == "concat" else rank or max(one) for one in ranks]
    return float(max(set(made), key=lambda one: (made.count(one), one)))


def _header(sources: Sequence[Source], method: Method) -> dict[str, str]:
    """What all files say alike, and what was done."""
    first = dict(sources[0].metadata)
    alike = {
        key: value
        for key, value in first.items()
        if key not in _OF_A_RUN and all(source.metadata.get(key) == value for source in sources)
    }
    phrases = [source.metadata.get(_PHRASE) for source in sources]
    settings = {**method.settings(), "adapters": ", ".join(source.path.name for source in sources)}
    alike |= {f"{OWN}recipe": "merge", f"{OWN}settings": json.dumps(settings, sort_keys=True)}
    if any(phrases):
        alike[_PHRASE] = alike["modelspec.title"] = ", ".join(dict.fromkeys(filter(None, phrases)))
    return alike


def _outline(source: Source, name: str) -> Layer:
    found = source.outline[name]
    assert isinstance(found, Layer)
    return found


def _shape(layer: Layer) -> list[int]:
    return [layer.up.shape[0], *layer.down.shape[1:]]


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    found = dtypes[0]
    for dtype in dtypes[1:]:
        found = torch.promote_types(found, dtype)
    return found
