"""Counting word by word gives what the tokenizer gives of the whole text, whatever stands in it."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from finetune.families.lengths import Lengths
from finetune.tinyworld import BASE

TOKENIZER: Any = CLIPTokenizer.from_pretrained(BASE, subfolder="tokenizer", local_files_only=True)
MARKS = [
    "a photo of",
    " ",
    "\t\n",
    "it's",
    "'s",
    "1234",
    "1.5",
    "ÄÖ",
    "é",
    "e\u0301",
    "\u0301",
    "ΣΑΣ",
    "日本",
    "🙂",
    "\u00a0",
]
MARKS += ["<|endoftext|>", "<zib>", "((b:1.2))", "...", "--", "\u200b", "\u3000", "\u2028", "\x1f", "\x85", "İ"]


def whole(text: str) -> int:
    return len(TOKENIZER(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(MARKS), st.text(max_size=6)), max_size=12).map("".join))
def test_words_add_up_to_the_text(text: str) -> None:
    assert Lengths(TOKENIZER)(text) == whole(text)


def test_words_that_are_learned_are_counted_anew() -> None:
    tokenizer: Any = CLIPTokenizer.from_pretrained(BASE, subfolder="tokenizer", local_files_only=True)
    lengths = Lengths(tokenizer)
    before = lengths("a <zib> star")
    tokenizer.add_tokens(["<zib>"])
    assert lengths("a <zib> star") == len(tokenizer("a <zib> star", add_special_tokens=False).input_ids) < before
