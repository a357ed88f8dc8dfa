"""What a recipe says of the words of captions, and what in it cannot be meant."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import NonNegativeInt

from finetune.config.section import Fraction, Section, Text

if TYPE_CHECKING:
    from finetune.config.schema import Recipe

Found = tuple[tuple[str | int, ...], str]
"""A key, and the rest of a sentence that begins with it."""

AT = ("data", "wording")


class WordingConfig(Section):
    """What is done to the captions of subject pictures, anew for each draw. The order is in docs/data.md."""

    prefix: Text | None = None
    """Put before every caption, with a space between. With the separator at its end it is a tag of its own."""
    suffix: Text | None = None
    """Put behind every caption, with a space between."""
    separator: Text = ","
    """What stands between tags."""
    shuffle: bool = False
    """Put the flexible tags in an order of the draw's own."""
    keep_tokens: NonNegativeInt = 0
    """So many tags at the beginning are fixed: neither moved nor left out. All others are flexible."""
    keep_tokens_separator: Text | None = None
    """A mark such as `|||` in captions: tags before it are fixed, and so are those behind a second one. It is removed.
    `keep_tokens` counts where a caption has no mark."""
    tag_dropout: Fraction = 0.0
    """Share of the flexible tags that is left out."""
    tag_dropout_mode: Literal["random", "full", "weighted"] = "random"
    """`random` leaves out each by itself, `full` all of them together, `weighted` each by itself and later ones more
    often: tag i of n, counted from 0 as they stand in the caption, with `i / n` of `tag_dropout`."""
    tag_dropout_except: list[Text] = []
    """Tags that are never left out; `*` and `?` stand for any letters and for one: `["zib *", "?girl"]`."""
    tag_dropout_only: list[Text] = []
    """The only tags that are ever left out, written likewise; all where it is empty."""
    tag_warmup_steps: NonNegativeInt = 0
    """Optimizer steps in which the flexible tags in use grow from the first one to all."""
    wildcards: bool = False
    """Take one of `{red|blue}`. Braces that are meant are doubled, or stand behind a backslash as a bar can, too."""
    secondary_separator: Text | None = None
    """A mark within tags that stay together, such as `;;`; at the end it becomes the separator."""
    replacements: dict[Text, str] = {}
    """Text and what takes its place, one after the other, last of all: `{NAME: zib}`."""

    @property
    def cuts(self) -> bool:
        """Whether captions are taken apart into tags."""
        return self.moves or self.keep_tokens_separator is not None

    @property
    def moves(self) -> bool:
        """Whether any tags are flexible."""
        return bool(self.shuffle or self.tag_dropout or self.tag_warmup_steps)

    @property
    def varies(self) -> bool:
        """Whether two draws of one caption can differ."""
        return self.moves or self.wildcards


class FolderName(NamedTuple):
    """A folder's name as kohya reads it: ``10_zib star`` is a caption and how often each picture appears."""

    repeats: int
    caption: str

    @classmethod
    def of(cls, name: str) -> FolderName | None:
        """What ``name`` says; None where it is not of this kind."""
        found = re.fullmatch(r"0*([1-9]\d{0,5})_(.*)", name)
        caption = " ".join(found[2].split()) if found else ""
        return cls(int(found[1]), caption) if found and caption else None


def contradictions(recipe: Recipe) -> Iterator[Found]:
    """Everything about captions that cannot be meant."""
    for index, concept in enumerate(recipe.data.concepts):
        if concept.captions == "folder" and concept.folder and concept.folder_name is None:
            text = f"is 'folder', but {concept.folder!r} is not called like '10_zib star', repeats and caption"
            yield ("data", "concepts", index, "captions"), text
    wording = recipe.data.wording
    if wording is None:
        return
    if wording.keep_tokens and not wording.moves:
        yield (*AT, "keep_tokens"), "is set, but no tag is shuffled or left out"
    for name in ("mode", "except", "only"):
        key = f"tag_dropout_{name}"
        if not wording.tag_dropout and getattr(wording, key) != WordingConfig.model_fields[key].default:
            yield (*AT, key), "is set, but tag_dropout is 0"
    if wording.tag_dropout_except and wording.tag_dropout_only:
        yield (*AT, "tag_dropout_except"), "is set with tag_dropout_only, which says already which tags stay"
    if wording.tag_warmup_steps > recipe.train.total_steps:
        text = f"must be at most the run's {recipe.train.total_steps} steps, not {wording.tag_warmup_steps}"
        yield (*AT, "tag_warmup_steps"), text
    marks = {name: getattr(wording, name) for name in ("keep_tokens_separator", "secondary_separator")}
    for name, mark in marks.items():
        if mark is not None and wording.separator in mark:
            yield (*AT, name), f"must not hold the separator {wording.separator!r}; it is {mark!r}"
    if wording.secondary_separator is not None and len(set(marks.values())) == 1:
        yield (*AT, "secondary_separator"), "must be another mark than keep_tokens_separator"
