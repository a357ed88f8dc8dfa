"""A LoRA of other ranks: each layer is cut off behind its largest singular values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UserError
from finetune.export.layers import Layer
from finetune.export.metadata import OWN
from finetune.export.tools.lowrank import Rule, recut, total_kept
from finetune.export.tools.save import common_alpha, number_type, require_adapter_file, save
from finetune.export.tools.source import Source, groups


@dataclass(frozen=True)
class Resized:
    """What was written.

    Attributes:
        ranks: by the names of layers, before and after.
        kept: share of the squares of all layers' changes; its root is the share of their norm.
    """

    path: Path
    ranks: dict[str, tuple[int, int]]
    kept: float


def resize(
    path: Path, out: Path, rule: Rule, *, to: str | None = None, dtype: str | None = None, base: str | None = None
) -> Resized:
    """Write a LoRA whose layers have the ranks that ``rule`` chooses, never larger ones than before.

    Args:
        to: layout; the file's own where it is not given.

    Raises:
        UserError: the file is no LoRA.
    """
    require_adapter_file(out)
    source = Source(path, base)
    if source.kind != "lora":
        raise UserError(f"{source.path}: is {source.kind}, whose rank cannot be changed without training")
    numbers = number_type(dtype) if dtype else source.dtype
    ranks: dict[str, tuple[int, int]] = {}
    kept: list[tuple[float, float]] = []

    def blocks() -> Iterator[list[Layer]]:
        for block in groups(list(source)):
            made = []
            for layer in map(source.layer, block):
                found = recut(layer, rule)
                ranks[layer.name] = (layer.rank, found.layer.rank)
                kept.append((found.kept, found.squares))
                made.append(found.layer)
            yield made

    settings = json.loads(source.metadata.get(f"{OWN}settings", "{}")) | {"resized": str(rule)}
    header = {**source.metadata, f"{OWN}settings": json.dumps(settings, sort_keys=True)}
    layout = to or ("kohya" if source.layout == "kohya" else "diffusers")
    save(out, layout, blocks(), source.names, numbers, header, common_alpha(source, numbers))
    return Resized(out, ranks, total_kept(kept))
