"""A picture with what belongs to it, read and checked as a run would."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from data_tools.sharding.listing import Listed
from finetune.data import captions, decoding
from finetune.data.masks import check_mask, mask_files
from finetune.errors import UserError


@dataclass(frozen=True)
class Sample:
    """What a shard holds of a picture.

    Attributes:
        key: its number among all pictures of the folder, nine digits.
        name: its path there.
        picture, mask: bytes of the files, as they are; no mask is empty.
        captions: at least one, which is "" where there is none.
        sha256: of the picture.
    """

    key: str
    name: str
    picture: bytes
    captions: tuple[str, ...]
    mask: bytes
    sha256: str

    @property
    def identity(self) -> list[object]:
        """Everything that decides what a shard holds of it."""
        return [self.key, self.name, self.sha256, self.captions, hashlib.sha256(self.mask).hexdigest()]


def read(folder: Path, listed: Listed, key: str, masks: Path | None) -> Sample:
    """Read a picture, its caption and its mask, which has the picture's name in the folder ``masks``.

    Raises:
        UserError: something cannot be read, a name or a caption is not UTF-8, or there is no mask.
    """
    path = folder / listed.name
    try:
        listed.name.encode()
    except UnicodeEncodeError:
        raise UserError(f"{str(path)!r}: has a name that is not UTF-8; rename the file") from None
    content, text = decoding.read(path), captions.sidecar(path)
    return Sample(
        key,
        listed.name,
        content,
        listed.captions or (captions.read_sidecar(text) if text else ()) or ("",),
        decoding.read(mask_of(listed.name, masks)) if masks else b"",
        hashlib.sha256(content).hexdigest(),
    )


def mask_of(name: str, masks: Path) -> Path:
    """The mask of a picture.

    Raises:
        UserError: there is none.
    """
    path = masks / name
    found = mask_files(path.stem, path.parent)
    if not found:
        raise UserError(f"{name}: has no mask in {path.parent}; expected {path.stem}.png")
    return found[0]


def check(sample: Sample, folder: Path) -> None:
    """Decode a sample whole.

    Raises:
        UserError: the picture or its mask is broken, or they do not fit together.
    """
    path = folder / sample.name
    facts = decoding.facts(sample.picture, sample.sha256, path)
    if sample.mask:
        name = path.with_name(f"{path.name} (its mask)")
        check_mask(decoding.grey(decoding.decode(sample.mask, name)), facts, name)
