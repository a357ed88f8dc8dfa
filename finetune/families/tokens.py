"""Rare tokens: words that a tokenizer knows whole and that mean next to nothing yet (DreamBooth, section 3.2,
https://arxiv.org/abs/2208.12242).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import Tensor

from finetune.family import ModelFamily

_SHORT_WORD = re.compile(r"[Ġ▁]?([a-z]{2,4})(?:</w>)?")  # vocabularies mark where words end, or the space before them


class RareToken(NamedTuple):
    """A candidate for a subject's name."""

    word: str
    id: int  # byte-pair vocabularies are ordered by frequency: the higher, the rarer
    norm: float | None  # of its embedding, where one was given


def rare_tokens(tokenizer: Any, embedding: Tensor | None = None, count: int = 20) -> list[RareToken]:
    """The rarest words of two to four letters that are one token each, rarest first.

    Args:
        tokenizer: of a text encoder.
        embedding: its table, float [V, D].
    """
    found = []
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda entry: -entry[1]):
        word = _SHORT_WORD.fullmatch(token)
        if word and pieces(tokenizer, word[1]) == [token]:
            found.append(RareToken(word[1], index, None if embedding is None else float(embedding[index].norm())))
        if len(found) == count:
            break
    return found


def pieces(tokenizer: Any, text: str) -> list[str]:
    """The tokens of ``text`` in the middle of a sentence."""
    return tokenizer.convert_ids_to_tokens(tokenizer(f" {text}", add_special_tokens=False).input_ids)


def check_trigger(family: ModelFamily, trigger: str, class_prompt: str | None) -> list[str]:
    """What is unwise about a subject's name, one sentence each; nothing where it is a good one."""
    warnings = []
    for vocabulary in family.sites.vocabularies:
        parts = pieces(vocabulary.tokenizer, trigger)
        if len(parts) > 1:
            shown = " + ".join(filter(None, (part.removesuffix("</w>").lstrip("Ġ▁") for part in parts)))
            rare = ", ".join(token.word for token in rare_tokens(vocabulary.tokenizer, count=3))
            warnings.append(f"{trigger!r} is {len(parts)} tokens ({shown}), a rare single one learns faster: {rare}")
    if class_prompt and trigger.lower() in re.findall(r"\w+", class_prompt.lower()):
        warnings.append(f"the class prompt {class_prompt!r} names the subject: it must say only what kind it is")
    return warnings
