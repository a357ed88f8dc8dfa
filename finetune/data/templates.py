"""Captions around a new word, which vary what is not to be learned (textual inversion, Gal et al. 2022). No torch.

In a template ``[name]`` is the word and ``[filewords]`` the picture's own caption, as in A1111.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from finetune.config.adapters import EmbeddingConfig
from finetune.errors import UserError, nearest

NAME, CAPTION = "[name]", "[filewords]"
TEMPLATES = {
    "object": (
        "a plain view of a [name]",
        "the [name] seen from nearby",
        "one [name] in the frame",
        "a dim view of the [name]",
        "a brightly lit [name]",
        "a tightly framed [name]",
        "the [name] with its edges cut off",
        "a tidy [name]",
        "a worn [name]",
        "my own [name] on display",
        "a little [name]",
        "a big [name]",
        "a pleasant shot of the [name]",
        "an odd looking [name]",
        "a hand drawn [name]",
        "a computer image of the [name]",
        "a fine picture of a [name]",
    ),
    "style": (
        "a scene made in the manner of [name]",
        "artwork that follows [name]",
        "a dark piece in the manner of [name]",
        "a bright piece in the manner of [name]",
        "a detail in the manner of [name]",
        "a small study in the manner of [name]",
        "a large canvas in the manner of [name]",
        "a digital image that follows [name]",
    ),
}
"""What a thing looks like is to be learned and not how it was taken; of a style the look, and not what is shown."""


@dataclass(frozen=True)
class Wording:
    """Templates and the words that they are about."""

    templates: tuple[str, ...]
    words: EmbeddingConfig

    @classmethod
    def of(cls, words: EmbeddingConfig) -> Wording:
        """With the templates that ``words.templates`` names; errors as in ``read_templates``."""
        return cls(read_templates(words.templates or "object"), words)

    @property
    def replaces(self) -> bool:
        """Whether pictures' own captions have no part."""
        return not any(CAPTION in template for template in self.templates)

    def captions(self, texts: tuple[str, ...], trigger: str | None) -> tuple[str, ...]:
        """All captions of a picture: each template with each of its own, each once.

        Raises:
            UserError: there are several words, and ``trigger`` does not say which is meant.
        """
        name = self.words.name(trigger)
        if name is None:
            raise UserError(f"templates need a trigger that says which of {', '.join(self.words.words)} is meant")
        filled = [template.replace(CAPTION, text) for template in self.templates for text in texts]
        return tuple(dict.fromkeys(" ".join(text.replace(NAME, name).split()) for text in filled))


def read_templates(source: str) -> tuple[str, ...]:
    """The templates of a list that is shipped, "object" or "style", or of a text file with one a line.

    Raises:
        UserError: there is no such file, it holds none, or a line has no ``[name]`` or an unknown mark.
    """
    if source in TEMPLATES:
        return TEMPLATES[source]
    path = Path(source)
    if not path.is_file():
        raise UserError(f"adapter.templates: no file {source!r}{nearest(source, TEMPLATES)}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8: offset {error.start}; save it as UTF-8") from None
    found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    for number, line in found:
        marks = re.findall(r"\[\w+\]", line)
        if unknown := [mark for mark in marks if mark not in (NAME, CAPTION)]:
            raise UserError(f"{path}:{number}: {unknown[0]} means nothing{nearest(unknown[0], (NAME, CAPTION))}")
        if NAME not in marks:
            raise UserError(f"{path}:{number}: has no {NAME}, the place of the new word: {line!r}")
    if not found:
        raise UserError(f"{path}: holds no template; expected lines such as 'a photo of a {NAME}'")
    return tuple(line for _, line in found)
