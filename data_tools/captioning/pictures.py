"""The pictures of a folder one after another, what they are called already, and what a model is shown of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

from PIL import Image

from finetune.config.schema import ConceptConfig
from finetune.data import captions, decoding, masks
from finetune.data.folders import nearest_folder
from finetune.errors import UserError

T = TypeVar("T")
U = TypeVar("U")

MARGIN = 0.1  # around the box of a mask, of its longer side
GREY = (127, 127, 127)


@dataclass(frozen=True, slots=True)
class Found:
    """A picture of a folder.

    Attributes:
        path: of its file.
        twin: an earlier picture of the same name with another ending, whose text file it would share.
    """

    path: Path
    twin: Path | None


def pictures(folder: Path, recursive: bool = False, leave_out: Path | None = None) -> Iterator[Found]:
    """The pictures of a folder, and of those below it, in the order of their names. Hidden ones are passed over.

    One folder's names are held at a time.

    Args:
        leave_out: a folder below that holds other things, such as masks.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {found}; expected a folder of pictures{nearest_folder(folder)}")
    other = leave_out.resolve() if leave_out else None
    for parent, below, names in os.walk(folder):
        visible = sorted(name for name in below if not name.startswith(".")) if recursive else []
        below[:] = [name for name in visible if (Path(parent) / name).resolve() != other]
        owners: dict[str, Path] = {}
        for path in (Path(parent) / name for name in sorted(names)):
            if decoding.is_picture(path):
                owner = owners.setdefault(path.stem, path)
                yield Found(path, None if owner == path else owner)


@dataclass(frozen=True, slots=True)
class Known:
    """The captions that a picture has, and the file that they stand in."""

    texts: tuple[str, ...]
    file: Path


def known(picture: Path, folder: Path) -> Known | None:
    """What a run would read as the caption of a picture in ``folder``; None where it has none.

    Metadata of the nearest folder that name it come first, up to ``folder``'s own; then the text file beside it.

    Raises:
        UserError: a line of metadata or the text file cannot be read.
    """
    for parent in picture.parents:
        rows, file = metadata(parent)
        row = rows.get(picture.relative_to(parent).as_posix())
        if row is not None and row.captions and file is not None:
            return Known(row.captions, file)
        if parent == folder:
            break
    beside = captions.sidecar(picture)
    texts = captions.read_sidecar(beside) if beside else ()
    return Known(texts, beside) if beside and texts else None


@lru_cache(maxsize=8)
def metadata(folder: Path) -> tuple[dict[str, captions.Row], Path | None]:
    """The rows of a folder's metadata and their file, as they were when this was first asked.

    Raises:
        UserError: some line cannot be read.
    """
    file = captions.metadata_file(folder)
    if file is None:
        return {}, None
    rows, problems = captions.read_metadata(file)
    if problems:
        raise UserError("\n".join(["metadata that cannot be read may hold captions:", *problems]))
    return rows, file


@dataclass(frozen=True, slots=True)
class View:
    """What a model is shown of a picture.

    Attributes:
        masks: a folder of masks with the pictures' names, or "alpha".
        describe: "subject" shows what is white in the mask, cut to its box with a margin, before grey; "background"
            shows the whole picture with the subject painted grey.
        longest_side: in pixels; a larger picture is scaled down.
    """

    masks: str | None = None
    describe: Literal["subject", "background"] = "subject"
    longest_side: int = 1024

    def __call__(self, path: Path) -> Image.Image:
        """The picture in RGB.

        Raises:
            UserError: it cannot be read, or its mask.
        """
        whole = decoding.decode(decoding.read(path), path)
        image = decoding.rgb(whole)
        if self.masks is not None:
            image = masked(image, self._mask(path, whole), self.describe)
        image.thumbnail((self.longest_side, self.longest_side), Image.Resampling.LANCZOS)
        return image

    def _mask(self, path: Path, whole: Image.Image) -> Image.Image:
        concept = ConceptConfig(folder=str(path.parent), masks=self.masks)
        file, _ = masks.find_mask(path, decoding.inspect(path), concept, "caption") or (masks.ALPHA, None)
        if isinstance(file, str):
            return decoding.alpha(whole)
        return decoding.grey(decoding.decode(decoding.read(file), file))


def masked(image: Image.Image, mask: Image.Image, describe: Literal["subject", "background"]) -> Image.Image:
    """What ``View`` shows of a picture in RGB with a mask in 8 bit grey, not empty."""
    grey = Image.new("RGB", image.size, GREY)
    if describe == "background":
        return Image.composite(grey, image, mask)
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    margin = round(MARGIN * max(right - left, bottom - top))
    box = (
        max(0, left - margin),
        max(0, top - margin),
        min(image.width, right + margin),
        min(image.height, bottom + margin),
    )
    return Image.composite(image, grey, mask).crop(box)


def ahead(items: Iterable[T], load: Callable[[T], U], depth: int) -> Iterator[tuple[T, U | UserError]]:
    """Items in their order with what ``load`` made of them, or why it could not.

    Args:
        depth: how many are loaded ahead, in threads, and held in memory.
    """
    waiting: list[tuple[T, Future[U]]] = []
    source = iter(items)
    with ThreadPoolExecutor(max_workers=min(depth, 4)) as pool:
        try:
            while True:
                waiting += [(item, pool.submit(load, item)) for item in islice(source, depth - len(waiting))]
                if not waiting:
                    return
                item, future = waiting.pop(0)
                try:
                    yield item, future.result()
                except UserError as error:
                    yield item, error
        finally:
            for _, future in waiting:
                future.cancel()


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Items in lists of ``size``, the last of which may be shorter."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch
