"""Masks of a folder of pictures, as files that a recipe's ``masks`` reads. What is there already stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.masking.shape import Shape
from data_tools.masking.way import Photo, Way
from finetune.data import decoding
from finetune.data.folders import picture_files
from finetune.data.masks import mask_files
from finetune.errors import UserError
from finetune.files import replacing


@dataclass(frozen=True)
class Made:
    """A picture and its mask.

    Attributes:
        share: of the picture that counts, in [0, 1].
        new: False where the mask was there already.
    """

    picture: Path
    mask: Path
    share: float
    new: bool = True


def pictures(source: Path) -> list[Path]:
    """Pictures of a folder, or one picture.

    Raises:
        UserError: there is none, or two have one name and so would share a mask.
    """
    if source.is_file() and decoding.is_picture(source):
        return [source]
    found, _ = picture_files(source, "FOLDER")
    if not found:
        raise UserError(f"{source}: has no pictures")
    by_stem: dict[str, Path] = {}
    for path in found:
        if (other := by_stem.setdefault(path.stem, path)) is not path:
            raise UserError(f"{path}: would have the mask of {other.name}; give one of them another name")
    return found


def check_folder(found: Sequence[Path], out: Path) -> None:
    """Whether masks of pictures can lie in a folder.

    Raises:
        UserError: it is that of the pictures, or a file.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; expected a folder for the masks")
    if out.resolve() == found[0].parent.resolve():
        raise UserError(f"--out {out}: is the folder of the pictures, whose names the masks have; choose another")


def make(found: Sequence[Path], out: Path, way: Way, shape: Shape, overwrite: bool = False) -> Iterator[Made | str]:
    """Make the mask of each picture that has none: ``out/<name>.png``, 8 bit grey, as large as the picture upright.

    Args:
        found: the pictures.
        overwrite: make those anew that are there.

    Yields:
        what was made or was there; a sentence for each picture that has no mask in the end, or keeps its old one.
    """
    for path in found:
        try:
            yield _one(path, out, way, shape, overwrite)
        except UserError as error:
            yield str(error)


def _one(path: Path, out: Path, way: Way, shape: Shape, overwrite: bool) -> Made:
    target = out / f"{path.stem}.png"
    there = mask_files(path.stem, out)
    if there and not overwrite:
        image = decoding.grey(decoding.decode(decoding.read(there[0]), there[0]))
        return Made(path, there[0], _share(image), new=False)
    if others := [file for file in there if file != target]:
        raise UserError(f"{path}: {others[0]} is a mask of it too, and would be read; remove it first")
    photo = Photo.read(path)
    image = shape.apply(way(photo))
    if image.size != photo.image.size:
        raise AssertionError(f"the mask is {image.size}, the picture {photo.image.size}")
    if image.getbbox() is None:
        raise UserError(f"{path}: nothing was found in it, and its mask would be empty; none was written")
    with replacing(target) as temporary:
        image.save(temporary, format="PNG", optimize=True)
    return Made(path, target, _share(image))


def _share(mask: Image.Image) -> float:
    return float(np.asarray(mask, dtype=np.float64).mean()) / 255
