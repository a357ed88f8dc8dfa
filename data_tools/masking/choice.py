"""Which way to a mask was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_tools.masking import models, plain, prompts
from data_tools.masking.carry import CarriedOver
from data_tools.masking.sam import Prompted, Sam
from data_tools.masking.text import Named
from data_tools.masking.way import Photo, Way
from finetune.data import decoding
from finetune.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Options of ``finetune data masks`` that decide where masks come from; one way must be asked for.

    Attributes:
        threshold: "border", "dark" or "light".
        points, negative, box: for all pictures, as words. prompts: a file of them.
        reference, reference_mask: one annotated picture.
        models: names or folders.
    """

    threshold: str | None = None
    alpha: bool = False
    text: str | None = None
    points: str | None = None
    negative: str | None = None
    box: str | None = None
    prompts: Path | None = None
    reference: Path | None = None
    reference_mask: Path | None = None
    models: Sequence[str] = ()


def choose(asked: Asked, pictures: Sequence[Path], cut: float, device: torch.device) -> Way:
    """The way that was asked for, its models loaded.

    Args:
        pictures: that masks are made of.
        cut: value from which a pixel counts.

    Raises:
        UserError: none or several were asked for, or one is not complete.
    """
    named = {
        "--threshold": asked.threshold is not None,
        "--alpha": asked.alpha,
        "--text": asked.text is not None,
        "--points, --box or --prompts": bool(asked.points or asked.negative or asked.box or asked.prompts),
        "--reference": bool(asked.reference or asked.reference_mask),
    }
    chosen = [name for name, given in named.items() if given]
    if len(chosen) != 1:
        found = f"found {' and '.join(chosen)}" if chosen else "found none"
        raise UserError(f"one way to a mask must be asked for, {found}; there are: {'; '.join(named)}")
    if asked.models and chosen[0] in ("--threshold", "--alpha"):
        raise UserError(f"--model {asked.models[0]}: {chosen[0]} needs no model")
    if asked.threshold is not None:
        return plain.threshold(asked.threshold)
    if asked.alpha:
        return plain.transparency
    if asked.text is not None:
        loaded = models.load(asked.models or [models.CLIPSEG], device)
        if loaded.clipseg is None:
            raise UserError("--text: a SAM reads no words; name a CLIPSeg with --model too")
        return Named(loaded.clipseg, asked.text, loaded.sam, cut)
    if chosen[0] == "--reference":
        return _carried(asked, device)
    return _prompted(asked, pictures, device)


def _prompted(asked: Asked, pictures: Sequence[Path], device: torch.device) -> Way:
    same = prompts.parse(asked.points, asked.negative, asked.box)
    names = [path.name for path in pictures]
    own = prompts.read_prompts(asked.prompts, names) if asked.prompts else {}
    return Prompted(_sam(asked, device), own, same)


def _carried(asked: Asked, device: torch.device) -> Way:
    if asked.reference is None or asked.reference_mask is None:
        missing = "--reference" if asked.reference is None else "--reference-mask"
        raise UserError(f"{missing}: is missing; one picture and its mask are carried over to the others")
    mask = decoding.grey(Photo.read(asked.reference_mask).image)
    return CarriedOver(_sam(asked, device), Photo.read(asked.reference), mask)


def _sam(asked: Asked, device: torch.device) -> Sam:
    loaded = models.load(asked.models or [models.SAM], device)
    if loaded.sam is None or loaded.clipseg is not None:
        raise UserError(f"--model {' '.join(asked.models)}: expected one SAM or SAM 2; a CLIPSeg belongs to --text")
    return loaded.sam
