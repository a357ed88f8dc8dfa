"""An adapter without some of its layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UserError
from finetune.export.layers import Layer
from finetune.export.tools.convert import write_changes
from finetune.export.tools.save import common_alpha, require_adapter_file, save
from finetune.export.tools.source import Source, groups


@dataclass(frozen=True)
class Pruned:
    """What was written, and the names of layers that stayed and went."""

    path: Path
    kept: list[str]
    dropped: list[str]


def prune(
    path: Path, out: Path, *, keep: Sequence[str] = (), drop: Sequence[str] = (), base: str | None = None
) -> Pruned:
    """Write an adapter with those layers of ``keep``, all where it is empty, that are not in ``drop``.

    Args:
        keep, drop: regular expressions for whole parts of a layer's path behind its component:
            "unet.down_blocks.1", "attn1", "text_encoder".

    Raises:
        UserError: an expression is broken or fits no layer, or no layer or all of them are left.
    """
    require_adapter_file(out)
    if not keep and not drop:
        raise UserError("say which layers to keep or to drop: --keep 'unet.up_blocks.1' or --drop text_encoder")
    source = Source(path, base)
    called = {name: _called(source, name) for name in source}
    kept_by, dropped_by = (_chosen(source, called, patterns) for patterns in (keep, drop))
    left = [name for name in called if (not keep or name in kept_by) and name not in dropped_by]
    gone = [name for name in called if name not in left]
    if not left or not gone:
        raise UserError(f"{source.path}: {'no' if not left else 'every'} layer of {len(called)} would be left")
    if source.kind == "lycoris":
        write_changes(source, out, "kohya" if source.layout == "kohya" else "peft", source.dtype, left)
        return Pruned(out, left, gone)

    def blocks() -> Iterator[list[Layer]]:
        for block in groups(left):
            yield [source.layer(name) for name in block]

    layout = "kohya" if source.layout == "kohya" else "diffusers"
    save(out, layout, blocks(), source.names, source.dtype, source.metadata, common_alpha(source, source.dtype))
    return Pruned(out, left, gone)


def _called(source: Source, name: str) -> str:
    network, _, module = name.partition(".")
    return f"{source.names[network].diffusers}.{module}"


def _chosen(source: Source, called: dict[str, str], patterns: Sequence[str]) -> set[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            wanted = re.compile(rf"(^|\.)(?:{pattern})(\.|$)")
        except re.error as error:
            raise UserError(f"{pattern!r} is no regular expression: {error}") from error
        found = {name for name, path in called.items() if wanted.search(path)}
        if not found:
            raise UserError(f"{pattern!r} fits none of {len(called)} layers, such as {min(called.values())}")
        chosen |= found
    return chosen
