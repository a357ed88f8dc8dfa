"""Sources of pictures to lists of checked pictures: everything that is wrong is said at once, before training.

No torch here, so that ``finetune plan`` stays quick.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from finetune.config.adapters import EmbeddingConfig
from finetune.config.origin import is_url
from finetune.config.schema import ConceptConfig, DataConfig
from finetune.config.wording import WordingConfig
from finetune.data import captions, embedded, origins
from finetune.data.decoding import Facts
from finetune.data.facts import Known
from finetune.data.framing import Box
from finetune.data.masks import find_mask
from finetune.data.origins import Finds, Sample, mirror
from finetune.data.places import Place
from finetune.data.templates import Wording
from finetune.data.wording import everything
from finetune.errors import UserError

MOST_PROBLEMS = 40  # lines of one error message


@dataclass(frozen=True, slots=True)
class Picture:
    """A checked picture with its captions.

    Attributes:
        id: names its randomness and stands in errors: concept and name, such as "0/dog.jpg", "0/000.tar/dog.jpg" or,
            for a row of a table, "0/17". The same wherever the source lies.
        path: where its bytes lie.
        captions: one or several, of which a draw takes one.
        facts: what the file holds.
        mask: a picture whose white counts, or "alpha" for the picture's own transparency.
        weight: how much it counts in the loss.
        timestep_bias: of its times towards noise; None where the recipe's holds.
        prior: it shows the class and not the subject.
        mask_box: around all of the mask that counts.
    """

    id: str
    path: Place
    captions: tuple[str, ...]
    facts: Facts
    mask: Place | str | None = None
    weight: float = 1.0
    timestep_bias: float | None = None
    prior: bool = False
    mask_box: Box | None = None


@dataclass(frozen=True, slots=True)
class Concept:
    """Pictures that belong together.

    Attributes:
        config: its part of the recipe, with the embedded world's names resolved to folders and prompts.
        pictures: in the order of their names.
        notes: what a person should know but need not mend.
    """

    config: ConceptConfig
    pictures: tuple[Picture, ...]
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Size of the picture files."""
        return sum(picture.facts.bytes for picture in self.pictures)


@dataclass(frozen=True)
class Survey:
    """What was found in the sources of a recipe: concepts with all pictures that are right, and all that is wrong."""

    concepts: list[Concept]
    problems: list[str]


def scan(data: DataConfig, *, captioned: bool = True, words: EmbeddingConfig | None = None) -> list[Concept]:
    """Find and decode every picture of a recipe with its captions and mask.

    Args:
        captioned: a picture must have a caption; it is "" where one has none otherwise.
        words: new words that are to be learned, and the templates around them, which are part of the captions then.

    Raises:
        UserError: naming everything that is wrong, in all concepts: missing and empty folders, files that are no
            pictures or cut short, captions that are missing or not UTF-8, bad lines of metadata, missing masks, new
            words that no caption holds.
    """
    found = survey(data, captioned=captioned, words=words)
    refuse(found.problems)
    return found.concepts


def survey(
    data: DataConfig,
    *,
    captioned: bool = True,
    words: EmbeddingConfig | None = None,
    known: Known | None = None,
    workers: int | None = None,
) -> Survey:
    """As ``scan``, but what is wrong is told and not raised.

    Args:
        known: facts of pictures; those of the recipe's cache where it is not set.
        workers: threads that look at pictures; as many as there are cores where it is not set.
    """
    known = known or Known(Path(data.cache.folder))
    problems: list[str] = []
    concepts = []
    cache = Path(data.cache.folder)
    wording = Wording.of(words) if words and words.templates else None
    for index, config in enumerate(data.concepts):
        where = f"data.concepts[{index}]"
        try:
            resolved = resolve(config, cache, where)
            found = origins.find(resolved, where, cache)
            problems.extend(found.problems)
            looked = partial(known.look_at_all, workers=workers)
            concepts.append(_scan(found, resolved, index, where, problems, captioned, wording, data.wording, looked))
        except UserError as error:
            problems.append(str(error))
    own = [text for concept in concepts for picture in concept.pictures for text in picture.captions]
    texts = [everything(text, data.wording) for text in own]
    if words and not problems:
        problems += [_unused(word, texts) for word in words.words if not any(word in text for text in texts)]
    return Survey(concepts, problems)


def resolve(config: ConceptConfig, cache: Path, where: str = "data.concepts") -> ConceptConfig:
    """``config`` with what its own words stand for filled in.

    ``tinyworld:subject/N`` is drawn below ``cache``, with its folder, masks and prompts; masks behind a URL are copied
    there.
    """
    if config.embedded:
        config = embedded.resolve(config, cache)
    if config.masks and is_url(config.masks):
        masks, _ = mirror.folder(config.masks, cache, f"{where}.masks")
        config = config.model_copy(update={"masks": str(masks)})
    return config


def refuse(problems: Sequence[str]) -> None:
    """Raise one ``UserError`` that lists ``problems``, where there are any."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        more = [f"... and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
        lines = "".join(f"\n  {line}" for line in [*problems[:MOST_PROBLEMS], *more])
        raise UserError(f"{len(problems)} things are wrong with the pictures:{lines}")


def refuse_doubts(data: DataConfig, doubts: Sequence[str]) -> None:
    """Raise one ``UserError`` that lists ``doubts``, where there are any and ``data.strict`` is set."""
    if data.strict and doubts:
        lines = "".join(f"\n  {doubt}" for doubt in doubts)
        raise UserError(f"data.strict: {_count(len(doubts), 'thing is', 'things are')} doubtful:{lines}")


def _unused(word: str, texts: Sequence[str]) -> str:
    return (
        f"adapter.tokens: {word!r} stands in no caption, so nothing would be learned; a caption is {texts[0]!r}. "
        "Write the word into the captions, set the concepts' trigger or prompt, or use templates"
    )


def _scan(
    found: Finds,
    config: ConceptConfig,
    index: int,
    where: str,
    problems: list[str],
    captioned: bool,
    wording: Wording | None,
    reworded: WordingConfig | None,
    looked: Callable[[Iterable[Place]], Iterable[Future[Facts]]],
) -> Concept:
    captioned = captioned and not (wording and wording.replaces)
    pictures, fallen = [], []
    looks = looked(sample.picture for sample in found.samples)
    for sample, look in zip(found.samples, looks, strict=True):
        path = sample.picture
        try:
            _check_name(path)
            facts = look.result()
            own = _own_captions(sample, config)
            texts = own or _instead(sample, config, captioned)
            texts = wording.captions(texts, config.trigger) if wording else texts
            mask, box = find_mask(path, facts, config, where, sample.mask) or (None, None)
            name, bias = f"{index}/{sample.name}", config.timestep_bias
            pictures.append(Picture(name, path, texts, facts, mask, config.weight, bias, mask_box=box))
            fallen += [] if own else [sample.name]
        except UserError as error:
            problems.append(str(error))
    notes = _notes(config, pictures, found.ignored, reworded)
    expected = config.captions not in ("auto", "prompt") or len(fallen) < len(pictures)
    if captioned and fallen and expected and config.prompt is not None:
        alone, several = "picture has no caption of its own and takes", "pictures have no caption of their own and take"
        notes.append(f"{config.source}: {_count(len(fallen), alone, several)} the prompt: {_some(fallen)}")
    return Concept(config, tuple(pictures), tuple(notes))


def _check_name(path: Place) -> None:
    """A picture's name stands in captions, logs and the names of its randomness."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{str(path)!r}: has a name that is not UTF-8; rename the file") from None


def _own_captions(sample: Sample, config: ConceptConfig) -> tuple[str, ...]:
    """A picture's captions from where the concept says; none where there are none."""
    texts: tuple[str, ...] = ()
    if config.captions in ("auto", "metadata"):
        texts = sample.captions
    if not texts and config.captions in ("auto", "sidecar") and sample.beside is not None:
        texts = captions.read_sidecar(sample.beside, config.caption_lines)
    if config.captions == "filename":
        texts = captions.from_name(sample.picture)
    if config.captions == "folder" and config.folder_name:
        texts = (config.folder_name.caption,)
    return texts


def _instead(sample: Sample, config: ConceptConfig, captioned: bool) -> tuple[str, ...]:
    """What a picture without captions of its own takes."""
    if config.prompt is not None:
        return (config.prompt,)
    if not captioned:
        return ("",)
    raise UserError(f"{sample.picture}: has no caption: {_mend(sample, config)}, or set prompt for those without")


def _mend(sample: Sample, config: ConceptConfig) -> str:
    if config.dataset is not None:
        return f"fill its column {config.dataset.text!r}" if config.dataset.text else "name a column with dataset.text"
    if config.captions == "filename":
        return "give it a name with words"
    return f"write {sample.picture.stem}.txt beside it"


def _notes(
    config: ConceptConfig, pictures: Sequence[Picture], others: Iterable[str], reworded: WordingConfig | None
) -> list[str]:
    """What a person should know, one line each."""
    notes = []
    ignored = [name for name in others if name != Path(config.masks or "").name]
    if ignored:
        notes.append(f"{config.source}: {_count(len(ignored), 'entry', 'entries')} ignored: {_some(ignored)}")
    if config.trigger:
        word = re.compile(rf"(?<!\w){re.escape(config.trigger)}(?!\w)", re.IGNORECASE)
        without = [
            p.path.name for p in pictures if not all(word.search(everything(text, reworded)) for text in p.captions)
        ]
        if without:
            held = _count(len(without), "caption lacks", "captions lack")
            notes.append(f"{config.source}: {held} the trigger {config.trigger!r}: {_some(without)}")
    moving = [picture.path.name for picture in pictures if picture.facts.frames > 1]
    if moving:
        notes.append(f"{config.source}: only the first frame is used of {_some(moving)}")
    alike: dict[str, list[str]] = {}
    for picture in pictures:
        alike.setdefault(picture.facts.sha256, []).append(picture.path.name)
    again = [" = ".join(names) for names in alike.values() if len(names) > 1]
    if again:
        notes.append(f"{config.source}: the same picture more than once: {_some(again)}")
    return notes


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
