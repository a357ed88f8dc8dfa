"""Masks: which file belongs to a picture, and whether it fits. No torch."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from finetune.config.schema import ConceptConfig
from finetune.data import decoding
from finetune.data.decoding import Facts
from finetune.data.folders import nearest_folder
from finetune.data.framing import Box
from finetune.data.places import Place
from finetune.errors import UserError, nearest

ALPHA = "alpha"  # the picture's own transparency


def find_mask(
    path: Place, facts: Facts, config: ConceptConfig, where: str, own: Place | None = None
) -> tuple[Place | str, Box] | None:
    """The mask of a picture as a concept has it, a file or ``ALPHA``, and the least box around all that counts.

    Args:
        path: of the picture.
        own: the mask that its source has for it.
        where: the concept is in the recipe, for messages.

    Raises:
        UserError: there is none, or it is empty or of another size.
    """
    if config.masks is None and own is None:
        return None
    mask: Place | None
    if config.masks == ALPHA:
        if not facts.transparent:
            raise UserError(f"{path}: has no transparency to take as its mask ({where}.masks: alpha)")
        mask, image = None, decoding.alpha(decoding.decode(decoding.read(path), path))
    else:
        mask = own or _mask_file(path, Path(config.masks or ""), where)
        image = decoding.grey(decoding.decode(decoding.read(mask), mask))
    return mask or ALPHA, check_mask(image, facts, mask or path)


def check_mask(image: Image.Image, facts: Facts, path: Place) -> Box:
    """The least box around all of a mask that counts; refuses one that is no mask of its picture.

    Args:
        image: the mask, grey.
        facts: of the picture.
        path: of the mask, for messages.

    Raises:
        UserError: it is empty or of another size.
    """
    if image.size != (facts.width, facts.height):
        raise UserError(
            f"{path}: is {image.width} x {image.height} pixels, but its picture is {facts.width} x {facts.height}"
        )
    if (box := image.getbbox()) is None:
        raise UserError(f"{path}: its mask is empty (black everywhere), so nothing of the picture would count")
    return Box(*box)


def mask_files(stem: str, folder: Path) -> list[Path]:
    """Files in a folder of masks that could belong to the picture of a name, in order: the first counts.

    The folder is not listed, which would take a million times a million names of a large set.
    """
    suffixes = sorted({kind for suffix in decoding.SUFFIXES for kind in (suffix, suffix.upper())})
    return [path for suffix in suffixes if (path := folder / f"{stem}{suffix}").is_file()]


def _mask_file(path: Place, folder: Path, where: str) -> Path:
    if not folder.is_dir():
        raise UserError(f"{where}.masks: {folder} does not exist{nearest_folder(folder)}")
    found = mask_files(path.stem, folder)
    if not found:
        names = [file.stem for file in folder.iterdir() if decoding.is_picture(file)]
        raise UserError(f"{path}: has no mask in {folder}; expected {path.stem}.png{nearest(path.stem, names[:20])}")
    return found[0]
