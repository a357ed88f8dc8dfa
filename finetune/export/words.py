"""New words put into a diffusers pipeline: into each of its text encoders, by diffusers' own loader."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from finetune.errors import UserError
from finetune.export.embedding import ALONE, Stored
from finetune.family import pool_at_end

_SUFFIXES = ("", "_2", "_3")  # of a pipeline's text encoders and tokenizers
_CLIPS = ("clip_l", "clip_g")


class Reader(NamedTuple):
    """A text encoder with its tokenizer."""

    encoder: Any
    tokenizer: Any


def text_encoders(pipeline: Any) -> dict[str, Reader]:
    """A pipeline's text encoders by their names in files of words; ``ALONE`` where there is only one."""
    found = [
        Reader(encoder, getattr(pipeline, f"tokenizer{suffix}"))
        for suffix in _SUFFIXES
        if (encoder := getattr(pipeline, f"text_encoder{suffix}", None)) is not None
    ]
    if len(found) == 1:
        return {ALONE: found[0]}
    t5 = [one for one in found if one.encoder.config.model_type.startswith("t5")]
    clips = [one for one in found if one not in t5]
    return dict(zip((*_CLIPS[: len(clips)], "t5xxl"), [*clips, *t5], strict=False))


def load_word(pipeline: Any, stored: Stored) -> None:
    """Teach a pipeline a word.

    Raises:
        UserError: the file's text encoders are not the pipeline's, the word is known already, or a width is another.
    """
    found = text_encoders(pipeline)
    parts = stored.parts
    if len(found) == 1 and len(parts) == 1:  # whatever the file calls it
        parts = {next(iter(found)): next(iter(parts.values()))}
    if parts.keys() != found.keys():
        held, wanted = (", ".join(one or "one text encoder" for one in keys) for keys in (parts, found))
        raise UserError(f"{stored.token!r} has vectors for {held}; the base has {wanted}")
    for name, rows in parts.items():
        encoder, tokenizer = found[name]
        with torch.random.fork_rng(devices=[]):  # transformers draws rows that are then replaced
            pipeline.load_textual_inversion(
                {stored.token: rows}, token=stored.token, text_encoder=encoder, tokenizer=tokenizer
            )
        pool_at_end(encoder, tokenizer)
