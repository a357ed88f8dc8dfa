"""Proof that an exported adapter is what was trained, by loading it as other tools do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.adapter import Weights
from finetune.errors import UserError, nearest
from finetune.export.base import load_base
from finetune.export.checks import Report, Verification
from finetune.export.kinds import kind
from finetune.export.read import Identity, identify

READERS = ("diffusers", "peft", "kohya", "comfyui", "a1111")


def verify(
    path: Path, base: str | None = None, against: Sequence[str] | None = None, weights: Weights | None = None
) -> Verification:
    """Load an adapter as other tools do, and compare.

    Every key must be read and be finite; diffusers' own loader must give each layer its weights, the denoiser's
    answer must be the one that the weights ask for, at half strength half of it. kohya's tools, ComfyUI and A1111 are
    not run: their names for the model's layers are (``finetune.export.readers``).

    Args:
        path: a LoRA file, a model folder or a run's folder.
        base: as in a recipe's ``model.path``; what the file says where it is not given. A model folder needs none.
        against: readers to try, of ``READERS``; all that the layout is meant for where it is not given.
        weights: what the file must hold; without them the file is only compared with itself.

    Raises:
        UserError: there is no such file, reader or base model. A damaged file is a failed check.
    """
    for reader in against or ():
        if reader not in READERS:
            raise UserError(f"there is no reader {reader!r} to verify against{nearest(reader, READERS)}")
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    report = Report()
    if found := report.run("readable", lambda: identify(path), lambda found: f"{found.kind}, layout {found.layout}"):
        one = kind(found.kind)
        one.check(report, found, base, against or _readers(found, base), weights)
    return Verification(found.path if found else path, tuple(report.checks))


def _readers(found: Identity, base: str | None) -> tuple[str, ...]:
    """The tools that a file is for: those of its layout, without those that read none of its family's in it."""
    meant = kind(found.kind).readers(found.layout)
    if found.layout not in ("kohya", "difference", "bundle"):
        return meant
    unread = load_base(found, base).export_names["denoiser"].unread_by
    return tuple(tool for tool in meant if tool not in unread)
