"""What ``verify`` asks of a file of LoKr, LoHa, OFT or whole differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.errors import GuardError
from finetune.export import lycoris_peft
from finetune.export.checks import Report, quiet
from finetune.export.compare import TOLERANCE, answer, close, identical, mapped
from finetune.export.layers import check
from finetune.export.lycoris import Change, check_learned, replaced
from finetune.export.lycoris_kohya import unpack
from finetune.export.metadata import OWN
from finetune.export.read import Identity, read_tensors
from finetune.export.readers import TOOLS
from finetune.family import ModelFamily

READERS: Mapping[str, tuple[str, ...]] = {
    "peft": ("peft",),
    "kohya": ("comfyui", "a1111"),
    "difference": ("comfyui", "a1111"),
}
"""Layout -> tools that read it."""

Expected = Callable[[torch.dtype], tuple[list[Change], dict[str, Tensor]]]
"""What was trained, and what a file of it must hold in a dtype."""


def check_file(
    report: Report,
    found: Identity,
    family: ModelFamily,
    against: Sequence[str],
    expected: Expected | None,
    apply: Callable[[Any, Identity, float], None],
) -> None:
    """Ask everything, the cheapest first; what needs the base model only where the file itself is sound.

    Args:
        apply: puts the file into a pipeline, as ``finetune sample`` does.
    """
    tensors = read_tensors(found.path)
    dtypes = [tensor.dtype for key, tensor in tensors.items() if not key.endswith(".alpha")] or [torch.float32]
    report.run("finite", lambda: check(tensors), lambda _: f"{len(tensors)} tensors, none empty, NaN or infinite")
    changes = report.run("keys", lambda: unpacked(found, tensors, family), lambda read: f"all read: {len(read)} layers")
    if changes is None or not report.passed:
        return
    report.run("learned", lambda: check_learned(changes), lambda _: "no network is as it was")
    report.run("header", lambda: _header(found, changes))
    wanted = changes
    if expected is not None:
        wanted, file = expected(dtypes[0])
        report.run("equal to memory", lambda: identical(tensors, file))
    if not report.passed:
        return
    family.require("denoiser", *family.text_encoders)
    if report.run("shapes", lambda: _shapes(changes, family)) is None:
        return
    readable = READERS[found.layout]
    for tool in against:
        if tool in TOOLS:
            report.run(tool, lambda tool=tool: mapped(tool, tensors, found, readable, family))  # type: ignore[misc]
    _check_drawn(report, found, family, wanted, TOLERANCE[dtypes[0]], apply)


def unpacked(found: Identity, tensors: Mapping[str, Tensor], family: ModelFamily) -> list[Change]:
    """A file's layers, by its layout."""
    if found.layout == "peft":
        return lycoris_peft.unpack(tensors, found.metadata, family.export_names)
    return unpack(tensors, family.export_names)


def _header(found: Identity, changes: Sequence[Change]) -> str:
    stated = found.metadata.get(f"{OWN}layers")
    if stated is not None and int(stated) != len(changes):
        raise GuardError(f"the header says {stated} layers, the file holds {len(changes)}")
    kinds = ", ".join(sorted({change.algorithm for change in changes}))
    return f"{kinds}, base {found.base or 'not named'}, {stated or 'unstated'} layers"


def _shapes(changes: Sequence[Change], family: ModelFamily) -> str:
    for change in changes:
        weight = dict(family.networks[change.network].named_parameters()).get(f"{change.module}.weight")
        if weight is None:
            raise GuardError(f"the base model has no layer {change.name}")
        change.changed(weight.detach())
    return f"fit the base model's {len(changes)} layers"


@torch.no_grad()
def _check_drawn(
    report: Report,
    found: Identity,
    family: ModelFamily,
    wanted: Sequence[Change],
    tolerance: float,
    apply: Callable[[Any, Identity, float], None],
) -> None:
    """Put the file into a fresh pipeline, and compare with arithmetic of our own."""
    names, tool = list(family.export_names), "peft" if found.layout == "peft" else "merged"
    base = answer(family)

    def drawn(strength: float) -> Tensor:
        family.release(*names)
        with quiet():
            apply(family.pipeline(), found, strength)
        return answer(family)

    for strength in (1.0,) if wanted[0].algorithm == "oft" else (1.0, 0.5):
        with replaced({name: family.networks[name] for name in names}, wanted, strength):
            right = answer(family)
        question = f"{tool}: {'loads, output' if strength == 1.0 else 'output at half'}"
        report.run(question, lambda right=right, at=strength: close(drawn(at), right, base, tolerance))  # type: ignore[misc]
        family.release(*names)
        family.require(*names)
