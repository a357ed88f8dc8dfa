"""The base's CLIP tokenizer: one token for each word of the world, bytes for everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.tinyworld.captions import words

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 24
_WORD_END = "</w>"


def byte_letters() -> list[str]:
    """The 256 letters that byte-level BPE writes bytes with: printable Latin-1 as it is, the rest moved up."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) for byte in kept] + [chr(256 + order) for order in range(len(moved))]


def merges_for(vocabulary: list[str], end: str = _WORD_END) -> list[tuple[str, str]]:
    """Merges that make each word one token (byte-pair encoding learned on a list in which every word counts once).

    The first pair of the first unfinished word is merged everywhere, until all words are whole; replaying the merges
    in this order therefore makes the same words whole again.
    """
    pieces = [[*word[:-1], word[-1] + end] for word in vocabulary]
    merges: list[tuple[str, str]] = []
    while unfinished := [piece for piece in pieces if len(piece) > 1]:
        left, right = unfinished[0][:2]
        merges.append((left, right))
        for piece in unfinished:
            at = 0
            while at < len(piece) - 1:
                if (piece[at], piece[at + 1]) == (left, right):
                    piece[at : at + 2] = [left + right]
                at += 1
    return merges


def build() -> CLIPTokenizer:
    """The tokenizer, ``model_max_length`` 24; as in SD 1 the padding is the end token."""
    from transformers import CLIPTokenizer

    letters = byte_letters()
    merges = merges_for(words())
    tokens = [*letters, *(letter + _WORD_END for letter in letters), *(a + b for a, b in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)
