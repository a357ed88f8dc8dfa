"""Prompts of more tokens than a CLIP text encoder reads at a time, in chunks as A1111 and Forge read them.

Every chunk has a start, an end and padding of its own and is encoded alone; what the encoder makes of them stands one
behind the other. A caption is cut where it is full, or behind a comma of its last tokens, so that tags stay whole.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune.batch import Conditioning

NEAR = 20
"""Tokens from the end of a chunk in which a comma is looked for: A1111's ``comma_padding_backtrack`` as it is set."""

Encode = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]

Units = Sequence[list[int]]
"""Ids of tokens, those together that are never cut apart: the vectors of a new word."""


class Split(NamedTuple):
    """A prompt in chunks of ids, at least one, without starts and ends; and how many tokens had no room."""

    chunks: list[list[int]]
    lost: int


def split(tokenizer: Any, units: Units, most: int) -> Split:
    """Fill up to ``most`` chunks. The last of them is filled to its end and the rest lost, as with a single one."""
    room, comma = tokenizer.model_max_length - 2, tokenizer.convert_tokens_to_ids(",</w>")
    chunks: list[list[int]] = []
    start = 0
    while True:
        end, size = start, 0
        while end < len(units) and size + len(units[end]) <= room:
            size += len(units[end])
            end += 1
        if end == len(units) or len(chunks) == most - 1 or end == start:  # the last: a word of more goes nowhere
            rest = _flat(units[start:])
            return Split([*chunks, rest[:room]], len(rest[room:]))
        if size == room and units[end] != [comma]:
            end = _behind_comma(units, start, end, comma)
        chunks.append(_flat(units[start:end]))
        start = end


def read_units(tokenizer: Any, text: str, words: Mapping[str, int] | None = None) -> Units:
    """The tokens of ``text``, its new words' together.

    Args:
        words: new words that the tokenizer does not know yet -> how many tokens each will be; their ids are -1.
    """
    units: list[list[int]] = []
    names = {index: token for token, index in tokenizer.get_added_vocab().items()}
    for part in re.split(f"({'|'.join(map(re.escape, words))})", text) if words else [text]:
        if words and part in words:
            units.append([-1] * words[part])
            continue
        for index in tokenizer(part, truncation=False, verbose=False).input_ids[1:-1]:
            if units and index in names and names[index] == f"{names.get(units[-1][0])}_{len(units[-1])}":
                units[-1].append(index)
            else:
                units.append([index])
    return units


def framed(tokenizer: Any, chunks: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Chunks with start, end and padding, and where there is no padding: two int64 [N, ``model_max_length``]."""
    length = tokenizer.model_max_length
    full = [[tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id] for chunk in chunks]
    ids = [[*chunk, *[tokenizer.pad_token_id] * (length - len(chunk))] for chunk in full]
    return torch.tensor(ids), torch.tensor([[int(place < len(chunk)) for place in range(length)] for chunk in full])


def read(tokenizer: Any, texts: Sequence[str], most: int, encode: Encode) -> Conditioning:
    """``texts``, in which new words are written out, each in as many chunks as it needs.

    A pooled answer is that of the first chunk, as in A1111 and ComfyUI.

    Args:
        most: chunks that a text may have.
        encode: ids and mask of chunks to their states [N, T, D], and their pooled answers [N, P] where there are any.
    """
    of_each = [split(tokenizer, read_units(tokenizer, text), most).chunks for text in texts]
    counts = [len(chunks) for chunks in of_each]
    states, pooled = encode(*framed(tokenizer, list(itertools.chain(*of_each))))
    first = None if pooled is None else torch.cat([part[:1] for part in pooled.split(counts)])
    whole = Conditioning.stack([Conditioning(tokens=part.flatten(0, 1)[None]) for part in states.split(counts)])
    return replace(whole, pooled=first)


def attach(pipeline: Any, read: Callable[[Sequence[str]], Conditioning], unguided_is_zero: bool = False) -> None:
    """Let ``pipeline`` read long prompts as ``read`` does; those of one chunk are left to its own ``encode_prompt``.

    Shorter ones of a call, and the prompts that guide away, are made as long as the longest with what the encoder makes
    of the empty prompt. To attention the empty prompt several times over is the empty prompt.

    Args:
        read: texts to tokens; new words in them are written out.
        unguided_is_zero: where no prompt guides away, zeros stand in its place.
    """
    plain = pipeline.encode_prompt

    @functools.wraps(plain)  # readers of its signature see the pipeline's own
    def encode_prompt(*arguments: Any, **named: Any) -> tuple[Tensor | None, ...]:
        bound = inspect.signature(plain).bind(*arguments, **named)
        bound.apply_defaults()
        asked = bound.arguments
        if asked["prompt"] is None or asked["prompt_embeds"] is not None:
            return plain(**asked)  # type: ignore[no-any-return]
        prompts = [asked["prompt"]] if isinstance(asked["prompt"], str) else asked["prompt"]
        away = asked["negative_prompt"] or ""
        away = [away] * len(prompts) if isinstance(away, str) else away
        texts = pipeline.maybe_convert_prompt([*prompts, *away], pipeline.tokenizer)
        empty, *encoded = (read([text]) for text in ["", *texts])
        longest = max(one.tokens.shape[1] for one in encoded)
        if longest == empty.tokens.shape[1]:
            return plain(**asked)  # type: ignore[no-any-return]
        made = {"": torch.cat([_lengthened(one.tokens, empty.tokens, longest) for one in encoded])}
        if empty.pooled is not None:
            made["pooled_"] = torch.cat([one.pooled for one in encoded if one.pooled is not None])
        embeds: dict[str, Tensor] = {}
        for kind, whole in made.items():
            own, guiding_away = whole.split(len(prompts))
            zero = unguided_is_zero and asked["negative_prompt"] is None
            embeds[f"{kind}prompt_embeds"] = own
            embeds[f"negative_{kind}prompt_embeds"] = torch.zeros_like(own) if zero else guiding_away
        return plain(**{**asked, "prompt": None, "negative_prompt": None, **embeds})  # type: ignore[no-any-return]

    pipeline.encode_prompt = encode_prompt


def _lengthened(tokens: Tensor, empty: Tensor, length: int) -> Tensor:
    return torch.cat([tokens, *[empty] * ((length - tokens.shape[1]) // empty.shape[1])], dim=1)


def _behind_comma(units: Units, start: int, end: int, comma: int) -> int:
    """The place behind the last comma that is ``NEAR`` the end, or the end."""
    behind = 0
    for place in range(end - 1, start - 1, -1):
        behind += len(units[place])
        if behind > NEAR:
            break
        if units[place] == [comma]:
            return place + 1
    return end


def _flat(units: Units) -> list[int]:
    return [index for unit in units for index in unit]
