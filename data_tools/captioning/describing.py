"""Pictures to the words that are written: a captioner, what ranks its candidates, phrases, and the wording."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image

from data_tools.captioning import loading, ranking
from data_tools.captioning.captioner import Caption, Captioner, Decoding
from data_tools.captioning.loading import Precision
from data_tools.captioning.models import LISTS, kind_of, load_captioner
from data_tools.captioning.scorer import EMBEDDED, Scorer, load_scorer
from data_tools.captioning.tagger import Thresholds
from data_tools.captioning.words import Wording
from finetune.errors import UserError
from finetune.randomness import generator


@dataclass(frozen=True, slots=True)
class Means:
    """What captions are made with.

    Attributes:
        model: a folder, a name of the hub or "tinyworld"; one that compares words with pictures chooses phrases.
        revision: of a hub model.
        instruction: what it is told; each kind of model has its own use for it.
        decoding, thresholds, precision: how it is run.
        candidates: captions of each picture, of which the nearest to it is taken: the likeliest, and samples.
        clip: a model that ranks candidates and chooses phrases.
        phrases: a file with one a line, of which ``top`` are added to each caption.
        seed: of the samples.
    """

    model: str
    revision: str | None = None
    instruction: str | None = None
    decoding: Decoding = field(default_factory=Decoding)
    thresholds: Thresholds = field(default_factory=Thresholds)
    precision: Precision = "auto"
    candidates: int = 1
    clip: str | None = None
    phrases: Path | None = None
    top: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.candidates > 1 and self.clip is None:
            raise UserError(f"--candidates {self.candidates}: needs --clip, a model that ranks them")
        if self.candidates > 1 and self.decoding.beams > 1:
            raise UserError("--candidates: are sampled, which a beam search does not do; leave --beams out")


class Describer:
    """``Means`` that are loaded.

    Args:
        device: where they compute.

    Raises:
        UserError: they cannot be loaded, or do not go together.
    """

    def __init__(self, means: Means, wording: Wording, device: torch.device) -> None:
        self._means, self._wording = means, wording
        phrases = ranking.read_phrases(means.phrases) if means.phrases else None
        self._captioner, self._scorer, self._phrases = _load(means, phrases, device)
        if means.candidates > 1 and not self._captioner.samples:
            raise UserError(f"--candidates: {means.model} has one answer to a picture, so there is nothing to rank")

    def __call__(self, images: Sequence[Image.Image], names: Sequence[str]) -> list[Caption]:
        """Captions as they are written; those without words stay empty.

        Args:
            images: RGB.
            names: of the pictures, which name what is sampled.

        Raises:
            ValueError: as ``Captioner.captions``.
        """
        draws = [self._draws(names, number) for number in range(self._means.candidates)]
        tries = [self._captioner.captions(images, generators) for generators in draws]
        said = tries[0]
        if self._scorer is not None and len(tries) > 1:
            said = ranking.choose(self._scorer, images, list(zip(*tries, strict=True)))
        found = self._phrases.best(images) if self._phrases else [[] for _ in images]
        return [self._worded(caption, more) for caption, more in zip(said, found, strict=True)]

    def _worded(self, caption: Caption, phrases: Sequence[str]) -> Caption:
        if not caption.text:
            return caption
        return replace(caption, text=" ".join(self._wording(", ".join([caption.text, *phrases])).split()))

    def _draws(self, names: Sequence[str], number: int) -> list[torch.Generator | None]:
        """The first candidate is the likeliest caption, the others are samples."""
        if number == 0:
            return [None for _ in names]
        return [generator(self._means.seed, "candidate caption", name, number) for name in names]


def _load(
    means: Means, phrases: list[str] | None, device: torch.device
) -> tuple[Captioner, Scorer | None, ranking.Phrases | None]:
    source = None if means.model == EMBEDDED else loading.find(means.model, means.revision, device, means.precision)
    if source is None or kind_of(source) in LISTS:
        if phrases is None:
            raise UserError(f"--model {means.model}: compares pictures with words, so it needs some: --phrases FILE")
        if means.clip is not None or means.instruction is not None:
            raise UserError(f"--model {means.model}: chooses phrases alone; --clip and --instruction say nothing to it")
        chooser = load_scorer(means.model, device, "--model", means.revision)
        return ranking.Phrases(chooser, phrases, means.top), None, None
    if phrases is not None and means.clip is None:
        raise UserError("--phrases: needs --clip, a model that compares them with pictures")
    if means.clip is not None and phrases is None and means.candidates == 1:
        raise UserError("--clip: has nothing to do; give --candidates or --phrases")
    scorer = load_scorer(means.clip, device) if means.clip is not None else None
    captioner = load_captioner(source, means.decoding, means.instruction, means.thresholds)
    return captioner, scorer, ranking.Phrases(scorer, phrases, means.top) if scorer and phrases else None
