"""``finetune data caption``: the pictures of a folder that have no caption, shared among processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from data_tools.captioning.captioner import Caption
from data_tools.captioning.describing import Describer, Means
from data_tools.captioning.pictures import View, ahead, in_batches
from data_tools.captioning.shared import Device, join, shown
from data_tools.captioning.todo import Todo, Where
from data_tools.captioning.words import Wording, has_words
from data_tools.captioning.writing import LOCK, Lines, Printed, Sidecars, Writer
from finetune.distributed import Processes
from finetune.errors import Stopped, UserError
from finetune.train.signals import Signals


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the pictures, of all processes together.

    Attributes:
        written: captions.
        had: pictures that had one already.
        full: captions that took all the tokens they were allowed to.
        refused: sentences about pictures that got none.
        main: whether this is the process that speaks.
    """

    written: int
    had: int
    full: int
    refused: tuple[str, ...]
    main: bool


def caption(
    where: Where,
    means: Means,
    wording: Wording,
    view: View,
    batch_size: int = 8,
    preview: int | None = None,
    device: Device = "auto",
) -> Outcome:
    """Caption the pictures of ``where``. All processes of a launcher must call it.

    Args:
        preview: print the captions of the first so many pictures of each process, and write none.

    Raises:
        UserError: something is wrong that no picture has to do with.
        Stopped: a signal came; what was captioned is kept.
    """
    where.check()
    processes = join(device)
    describer = Describer(means, wording, processes.device)
    todo = Todo(where, processes.rank, processes.world)
    wanted: Iterable[Path] = iter(todo)
    if preview is not None:
        wanted = islice(wanted, preview)
    worker = _Worker(where.folder, describer, _writer(where, preview))
    with Signals() as signals:
        try:
            batches = in_batches(ahead(wanted, view, 2 * batch_size), batch_size)
            for batch in shown(batches, "Captioning", processes):
                worker.take(batch)
                if signals.name:
                    raise Stopped(f"{signals.name}: stopped after {worker.written} captions; start again to go on")
        finally:
            worker.writer.close()
    return _together(worker, todo, processes, where)


class _Worker:
    """What one process has done so far."""

    def __init__(self, folder: Path, describer: Describer, writer: Writer) -> None:
        self._folder, self._describer, self.writer = folder, describer, writer
        self.written = self.full = 0
        self.refused: list[str] = []

    def take(self, batch: Sequence[tuple[Path, Image.Image | UserError]]) -> None:
        """Caption a batch, and write what came of it."""
        self.refused += [str(error) for _, error in batch if isinstance(error, UserError)]
        loaded = [(path, image) for path, image in batch if not isinstance(image, UserError)]
        for (path, _), said in zip(loaded, self._describe(loaded), strict=True):
            if isinstance(said, UserError):
                self.refused.append(str(said))
            elif not has_words(said.text):
                self.refused.append(f"{path}: the model said {said.text!r}, which are no words")
            else:
                self.writer.write(path, said.text)
                self.written += 1
                self.full += said.full

    def _describe(self, loaded: Sequence[tuple[Path, Image.Image]]) -> Sequence[Caption | UserError]:
        """Captions of a batch; where the model refuses it, of each by itself."""
        if not loaded:
            return []
        names = [path.relative_to(self._folder).as_posix() for path, _ in loaded]
        try:
            return self._describer([image for _, image in loaded], names)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{len(loaded)} pictures at once are too many for the memory; lower --batch-size"
            ) from error
        except ValueError as error:  # processors refuse pictures of odd shapes so
            if len(loaded) == 1:
                return [UserError(f"{loaded[0][0]}: the model cannot take it: {error}")]
            return [said for one in loaded for said in self._describe([one])]


def _writer(where: Where, preview: int | None) -> Writer:
    if preview is not None:
        return Printed()
    return Sidecars() if where.form == "sidecar" else Lines(where.folder, where.overwrite)


def _together(worker: _Worker, todo: Todo, processes: Processes, where: Where) -> Outcome:
    counts = processes.gather_object((worker.written, todo.had, worker.full))
    refused = processes.gather_object([*todo.refused, *worker.refused])
    if processes.is_main:  # nobody holds it any more
        (where.folder / LOCK).unlink(missing_ok=True)
    written, had, full = (sum(numbers) for numbers in zip(*counts, strict=True))
    return Outcome(written, had, full, tuple(one for some in refused for one in some), processes.is_main)
