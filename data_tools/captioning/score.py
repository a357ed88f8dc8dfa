"""``finetune data score``: how well the captions of a folder fit its pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data_tools.captioning.pictures import View, ahead, in_batches, known, metadata, pictures
from data_tools.captioning.scorer import Scorer, load_scorer
from data_tools.captioning.shared import Device, join, shown
from finetune.errors import UserError


@dataclass(frozen=True, slots=True, order=True)
class Score:
    """How near a caption is to its picture.

    Attributes:
        cosine: of the angle between the two, -1 to 1. What is usual depends on the scorer: compare within one.
        picture: its name in the folder.
        caption: one of those it has.
    """

    cosine: float
    picture: str
    caption: str


@dataclass(frozen=True, slots=True)
class Scores:
    """Of all processes together.

    Attributes:
        all: the worst first.
        without: pictures that have no caption.
        refused: sentences about pictures that could not be scored.
        main: whether this is the process that speaks.
    """

    all: tuple[Score, ...]
    without: int
    refused: tuple[str, ...]
    main: bool


def score(
    folder: Path,
    model: str,
    revision: str | None = None,
    recursive: bool = False,
    view: View | None = None,
    batch_size: int = 16,
    device: Device = "auto",
) -> Scores:
    """Score every caption of a folder. All processes of a launcher must call it.

    Args:
        model: a folder, a name of the hub or "tinyworld".

    Raises:
        UserError: there is no such folder or model.
    """
    next(pictures(folder), None)
    metadata.cache_clear()
    processes = join(device)
    scorer = load_scorer(model, processes.device, "--model", revision)
    share = _Captioned(folder, recursive, processes.rank, processes.world)
    batches = in_batches(ahead(share, lambda one: (view or View())(one[0]), 2 * batch_size), batch_size)
    found: list[Score] = []
    refused: list[str] = []
    for batch in shown(batches, "Scoring", processes):
        refused += [str(error) for _, error in batch if isinstance(error, UserError)]
        loaded = [(*one, image) for one, image in batch if not isinstance(image, UserError)]
        found += _scored(folder, scorer, loaded)
    parts = processes.gather_object((found, share.without, [*share.refused, *refused]))
    return Scores(
        all=tuple(sorted(one for scores, _, _ in parts for one in scores)),
        without=sum(without for _, without, _ in parts),
        refused=tuple(one for _, _, some in parts for one in some),
        main=processes.is_main,
    )


class _Captioned:
    """One process's share of the pictures that have captions, with those.

    Attributes:
        without: how many had none, of those passed so far.
        refused: sentences about those whose captions cannot be read.
    """

    def __init__(self, folder: Path, recursive: bool, rank: int, world: int) -> None:
        self._folder, self._recursive, self._rank, self._world = folder, recursive, rank, world
        self.without = 0
        self.refused: list[str] = []

    def __iter__(self) -> Iterator[tuple[Path, tuple[str, ...]]]:
        for index, found in enumerate(pictures(self._folder, self._recursive)):
            if index % self._world == self._rank:
                try:
                    has = known(found.path, self._folder)
                except UserError as error:
                    self.refused.append(str(error))
                    continue
                if has is None:
                    self.without += 1
                else:
                    yield found.path, has.texts


def _scored(folder: Path, scorer: Scorer, loaded: Sequence[tuple[Path, tuple[str, ...], Image.Image]]) -> list[Score]:
    """Scores of a batch, of each of a picture's captions."""
    if not loaded:
        return []
    seen = scorer.images([image for _, _, image in loaded])
    scores = []
    for picture, (path, texts, _) in zip(seen, loaded, strict=True):
        near = (scorer.texts(texts) @ picture).tolist()
        name = path.relative_to(folder).as_posix()
        scores += [Score(cosine, name, text) for cosine, text in zip(near, texts, strict=True)]
    return scores
