"""Folders of pictures to lists of checked pictures: everything that is wrong is said at once, before training.

No torch here, so that ``finetune plan`` stays quick.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.config.adapters import EmbeddingConfig
from finetune.config.schema import ConceptConfig, DataConfig
from finetune.config.wording import WordingConfig
from finetune.data import captions, decoding, embedded
from finetune.data.decoding import Facts
from finetune.data.folders import picture_files
from finetune.data.masks import find_mask
from finetune.data.templates import Wording
from finetune.data.wording import everything
from finetune.errors import UserError, nearest

MOST_PROBLEMS = 40  # lines of one error message


@dataclass(frozen=True, slots=True)
class Picture:
    """A checked picture with its captions.

    Attributes:
        id: names its randomness and stands in errors: concept and path, such as "0/dog.jpg". The same wherever the
            folder lies.
        path: of the file.
        captions: one or several, of which a draw takes one.
        facts: what the file holds.
        mask: picture file whose white counts, or "alpha" for the picture's own transparency.
        weight: how much it counts in the loss.
        timestep_bias: of its times towards noise; None where the recipe's holds.
        prior: it shows the class and not the subject.
    """

    id: str
    path: Path
    captions: tuple[str, ...]
    facts: Facts
    mask: Path | str | None = None
    weight: float = 1.0
    timestep_bias: float | None = None
    prior: bool = False


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
    """What was found in the folders of a recipe: concepts with all pictures that are right, and all that is wrong."""

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


def survey(data: DataConfig, *, captioned: bool = True, words: EmbeddingConfig | None = None) -> Survey:
    """As ``scan``, but what is wrong is told and not raised."""
    problems: list[str] = []
    concepts = []
    wording = Wording.of(words) if words and words.templates else None
    for index, config in enumerate(data.concepts):
        where = f"data.concepts[{index}]"
        try:
            resolved = resolve(config, Path(data.cache.folder))
            concepts.append(_scan(resolved, index, where, problems, captioned, wording, data.wording))
        except UserError as error:
            problems.append(str(error))
    own = [text for concept in concepts for picture in concept.pictures for text in picture.captions]
    texts = [everything(text, data.wording) for text in own]
    if words and not problems:
        problems += [_unused(word, texts) for word in words.words if not any(word in text for text in texts)]
    return Survey(concepts, problems)


def resolve(config: ConceptConfig, cache: Path) -> ConceptConfig:
    """``config`` with ``tinyworld:subject/N`` drawn below ``cache`` and its folder, masks and prompts filled in."""
    if not config.folder.startswith(embedded.SCHEME):
        return config
    return embedded.resolve(config, cache)


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
    config: ConceptConfig,
    index: int,
    where: str,
    problems: list[str],
    captioned: bool,
    wording: Wording | None,
    reworded: WordingConfig | None,
) -> Concept:
    folder = Path(config.folder)
    files, others = picture_files(folder, f"{where}.folder")
    if config.captions == "folder" and config.folder_name is None:
        raise UserError(f"{where}.captions: is 'folder', but {folder} is not called like '10_zib star'")
    metadata, rows = _metadata(folder, config, where, problems)
    files = sorted({*files, *(folder / name for name in rows if (folder / name).is_file())})
    if not files:
        raise UserError(f"{where}.folder: {folder} holds no pictures ({', '.join(sorted(decoding.SUFFIXES))})")
    missing = [name for name in rows if not (folder / name).is_file()]
    names = [path.relative_to(folder).as_posix() for path in files]
    for name in missing:
        problems.append(f"{metadata}:{rows[name].line}: there is no {name} in the folder{nearest(name, names[:20])}")
    captioned = captioned and not (wording and wording.replaces)
    pictures, fallen = [], []
    for path, name in zip(files, names, strict=True):
        try:
            _check_name(path)
            facts = decoding.inspect(path)
            own = _own_captions(path, rows.get(name), config)
            texts = own or _instead(path, config, captioned)
            texts = wording.captions(texts, config.trigger) if wording else texts
            mask = find_mask(path, facts, config, where)
            pictures.append(Picture(f"{index}/{name}", path, texts, facts, mask, config.weight, config.timestep_bias))
            fallen += [] if own else [name]
        except UserError as error:
            problems.append(str(error))
    stems = {path.stem for path in files}
    ignored = [
        path for path in others if path != metadata and not (path.suffix in captions.SIDECARS and path.stem in stems)
    ]
    notes = _notes(config, pictures, ignored, reworded)
    expected = config.captions not in ("auto", "prompt") or len(fallen) < len(pictures)
    if captioned and fallen and expected and config.prompt is not None:
        alone, several = "picture has no caption of its own and takes", "pictures have no caption of their own and take"
        notes.append(f"{config.folder}: {_count(len(fallen), alone, several)} the prompt: {_some(fallen)}")
    return Concept(config, tuple(pictures), tuple(notes))


def _check_name(path: Path) -> None:
    """A picture's name stands in captions, logs and the names of its randomness."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{str(path)!r}: has a name that is not UTF-8; rename the file") from None


def _metadata(
    folder: Path, config: ConceptConfig, where: str, problems: list[str]
) -> tuple[Path | None, dict[str, captions.Row]]:
    """The file that a concept's captions are read from, where there is one, and its rows."""
    path = captions.metadata_file(folder)
    if config.captions == "metadata" and path is None:
        raise UserError(f"{where}.captions: there is no {' or '.join(captions.METADATA)} in {folder}")
    if config.captions not in ("auto", "metadata") or path is None:
        return path, {}
    rows, wrong = captions.read_metadata(path)
    problems.extend(wrong)
    return path, rows


def _own_captions(path: Path, row: captions.Row | None, config: ConceptConfig) -> tuple[str, ...]:
    """A picture's captions from where the concept says; none where there are none."""
    texts: tuple[str, ...] = ()
    if config.captions in ("auto", "metadata") and row:
        texts = row.captions
    if not texts and config.captions in ("auto", "sidecar"):
        texts = captions.read_sidecar(path, config.caption_lines)
    if config.captions == "filename":
        texts = captions.from_name(path)
    if config.captions == "folder" and config.folder_name:
        texts = (config.folder_name.caption,)
    return texts


def _instead(path: Path, config: ConceptConfig, captioned: bool) -> tuple[str, ...]:
    """What a picture without captions of its own takes."""
    if config.prompt is not None:
        return (config.prompt,)
    if not captioned:
        return ("",)
    mend = "give it a name with words" if config.captions == "filename" else f"write {path.stem}.txt beside it"
    raise UserError(f"{path}: has no caption: {mend}, or set prompt for those without")


def _notes(
    config: ConceptConfig, pictures: Sequence[Picture], others: Iterable[Path], reworded: WordingConfig | None
) -> list[str]:
    """What a person should know, one line each."""
    notes = []
    ignored = [path.name for path in others if path.name != Path(config.masks or "").name]
    if ignored:
        notes.append(f"{config.folder}: {_count(len(ignored), 'entry', 'entries')} ignored: {_some(ignored)}")
    if config.trigger:
        word = re.compile(rf"(?<!\w){re.escape(config.trigger)}(?!\w)", re.IGNORECASE)
        without = [
            p.path.name for p in pictures if not all(word.search(everything(text, reworded)) for text in p.captions)
        ]
        if without:
            held = _count(len(without), "caption lacks", "captions lack")
            notes.append(f"{config.folder}: {held} the trigger {config.trigger!r}: {_some(without)}")
    moving = [picture.path.name for picture in pictures if picture.facts.frames > 1]
    if moving:
        notes.append(f"{config.folder}: only the first frame is used of {_some(moving)}")
    alike: dict[str, list[str]] = {}
    for picture in pictures:
        alike.setdefault(picture.facts.sha256, []).append(picture.path.name)
    again = [" = ".join(names) for names in alike.values() if len(names) > 1]
    if again:
        notes.append(f"{config.folder}: the same picture more than once: {_some(again)}")
    return notes


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
