"""Class images without a recipe: for ``prior.folder``, and for trainers that want a folder of regularisation images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.config.schema import ModelConfig
from finetune.data.drawing import ClassImages, Drawing
from finetune.data.processes import Processes
from finetune.distributed import start
from finetune.errors import UserError
from finetune.families import load_family
from finetune.family import ModelFamily

LONGEST = 200
"""Bytes of a folder's name; most file systems have 255."""


def draw(prompts: Mapping[Path, str], model: ModelConfig, drawing: Drawing) -> Mapping[Path, Sequence[Path]]:
    """Draw the missing images of each prompt. Processes share the work.

    Args:
        prompts: by the folders that their images are kept in.

    Returns:
        All images of each folder.

    Raises:
        UserError: there is no such model, it cannot draw such a size, or a folder holds other pictures.
    """
    processes = start()
    return fill(prompts, load_family(model, device=processes.device), drawing, processes)


def fill(
    prompts: Mapping[Path, str], family: ModelFamily, drawing: Drawing, processes: Processes
) -> Mapping[Path, Sequence[Path]]:
    """As ``draw``, with a family that is there."""
    side, multiple = drawing.resolution, family.pixel_multiple
    if side is not None and side % multiple:
        raise UserError(f"--size is {side}; {family.name} at {family.source} needs a multiple of {multiple}")
    images = [ClassImages(prompt, family, drawing, folder) for folder, prompt in prompts.items()]
    for one in images:
        one.require_own()
    return {one.folder: one.fill(processes) for one in images}


def folders(prompts: Sequence[str], out: Path, repeats: int = 1) -> dict[Path, str]:
    """A folder below ``out`` for each prompt, called as kohya's trainer reads it: repeats and caption, ``1_a dog``.

    Raises:
        UserError: two prompts would have one folder, or a prompt is too long for one.
    """
    found: dict[Path, str] = {}
    for prompt in dict.fromkeys(prompts):
        words = " ".join(re.sub(r'[\x00-\x1f<>:"/\\|?*]', " ", prompt).split()).strip(". ")
        folder = out / f"{repeats}_{words}"
        if not words or len(folder.name.encode()) > LONGEST:
            raise UserError(f"{prompt!r} cannot be a folder's name; draw it alone, with --prompt and --out")
        if folder in found:
            raise UserError(
                f"{prompt!r} and {found[folder]!r} would be the same folder {folder}; draw one of them alone"
            )
        found[folder] = prompt
    return found


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        UserError: it cannot be read, is not UTF-8, or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    prompts = [words for line in lines if (words := " ".join(line.split()))]
    if not prompts:
        raise UserError(f"{path}: holds no prompts; expected one on each line")
    return prompts
