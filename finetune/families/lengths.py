"""How many tokens a text is, counted word by word: captions of a set share their words, a million of them too."""

from __future__ import annotations

from typing import Any

REMEMBERED = 1 << 18  # words


class Lengths:
    """Counts of a tokenizer that never joins characters on two sides of a space, as CLIP's byte-pair encoding.

    Args:
        tokenizer: of transformers; it may learn new words.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, int] = {}
        self._vocabulary = len(tokenizer)

    def __call__(self, text: str) -> int:
        """Tokens of ``text`` without start and end."""
        if len(self._tokenizer) != self._vocabulary or len(self._known) > REMEMBERED:
            self._known, self._vocabulary = {}, len(self._tokenizer)
        known = self._known
        return sum(known[word] if word in known else self._count(word) for word in text.split(" "))

    def _count(self, word: str) -> int:
        ids = self._tokenizer(word, add_special_tokens=False, truncation=False, verbose=False).input_ids
        self._known[word] = len(ids)
        return len(ids)
