"""What becomes of a model's words before they are written: the trigger, and a sentence around them. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from string import Formatter

from finetune.errors import UserError, nearest

FIELDS = ("caption", "trigger")
_ARTICLE = re.compile(r"\b([Aa])n?(\s+)$")


@dataclass(frozen=True, slots=True)
class Wording:
    """Where the trigger goes, the first of: where the template has it, before the class word, before everything.

    Attributes:
        trigger: a word of the subject's own, such as "zib".
        class_word: what the subject is, such as "dog": "a dog on the beach" becomes "a zib dog on the beach".
        template: such as "a photo of {trigger}, {caption}".

    Raises:
        UserError: they do not go together.
    """

    trigger: str | None = None
    class_word: str | None = None
    template: str = "{caption}"

    def __post_init__(self) -> None:
        names = self._names()
        for name in names:
            if name not in FIELDS:
                raise UserError(f"--template: {{{name}}} is unknown{nearest(name, FIELDS)}")
        if "caption" not in names:
            raise UserError(f"--template: {self.template!r} has no {{caption}}, so all pictures would get the same one")
        if "trigger" in names and self.trigger is None:
            raise UserError("--template: has {trigger}, but there is no --trigger")
        if "trigger" in names and self.class_word is not None:
            raise UserError("--template: has {trigger}, so --class-word says nothing; leave one of them out")
        if self.class_word is not None and self.trigger is None:
            raise UserError("--class-word: says where the trigger goes, but there is no --trigger")

    def __call__(self, caption: str) -> str:
        """``caption`` as it is written."""
        if self.trigger is not None and "trigger" not in self._names():
            caption = put_in(caption, self.trigger, self.class_word)
        return self.template.format(caption=caption, trigger=self.trigger)

    def _names(self) -> list[str]:
        try:
            parts = list(Formatter().parse(self.template))
        except ValueError as error:
            raise UserError(f"--template: {self.template!r} cannot be read: {error}") from None
        if any(spec or conversion for _, _, spec, conversion in parts):
            raise UserError(
                f"--template: {self.template!r}: expected {{caption}} and {{trigger}}, and no more in braces"
            )
        return [name for _, name, _, _ in parts if name is not None]


def put_in(caption: str, trigger: str, class_word: str | None) -> str:
    """``caption`` with the trigger before the class word, or else before everything; as it is where it has it already.

    An article before the class word becomes the trigger's: "an owl" is "a zib owl".
    """
    if _word(trigger).search(caption):
        return caption
    found = _word(class_word).search(caption) if class_word else None
    if found is None:
        return f"{trigger}, {caption}"
    before, rest = caption[: found.start()], caption[found.start() :]
    return f"{_ARTICLE.sub(_article(trigger), before)}{trigger} {rest}"


def has_words(caption: str) -> bool:
    """Whether there is a letter or digit of any script in it."""
    return any(letter.isalnum() for letter in caption)


def _article(trigger: str) -> str:
    return r"\1n\2" if trigger[:1].lower() in "aeiou" else r"\1\2"


def _word(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
