"""New words put into each text encoder of a diffusers pipeline, by diffusers' own loader where there is one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.export.embedding import ALONE, Stored
from finetune.families.words import write_out
from finetune.family import add_tokens, pool_at_end

_SUFFIXES = ("", "_2", "_3")  # of a pipeline's text encoders and tokenizers
_CLIPS = ("clip_l", "clip_g")


class Reader(NamedTuple):
    """A text encoder with its tokenizer."""

    encoder: Any
    tokenizer: Any


def text_encoders(pipeline: Any) -> dict[str, Reader]:
    """A pipeline's text encoders by their names in files of words; ``ALONE`` where there is only one."""
    found = [
        Reader(encoder, _tokenizer(getattr(pipeline, f"tokenizer{suffix}")))
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
    load = getattr(pipeline, "load_textual_inversion", None)
    for name, rows in parts.items():
        encoder, tokenizer = found[name]
        table = encoder.get_input_embeddings().weight
        table.data = table.data.clone()  # loaders write into it, and others may share it
        if load is None:
            _place(encoder, tokenizer, stored.token, rows)
        else:
            with torch.random.fork_rng(devices=[]):  # transformers draws rows that are then replaced
                load({stored.token: rows}, token=stored.token, text_encoder=encoder, tokenizer=tokenizer)
        pool_at_end(encoder, tokenizer)
    if load is None and stored.vectors > 1:
        whole = " ".join(_tokens(stored.token, stored.vectors))
        write_out(pipeline, lambda text: text.replace(stored.token, whole))


def _tokenizer(reader: Any) -> Any:
    """The tokenizer, which in some pipelines is part of a processor that reads pictures too."""
    return getattr(reader, "tokenizer", reader)


@torch.no_grad()
def _place(encoder: Any, tokenizer: Any, token: str, rows: Tensor) -> None:
    """Put ``rows`` [n, D] behind the table of ``encoder``, under the names that diffusers would give them."""
    tokens = _tokens(token, len(rows))
    if known := [one for one in tokens if one in tokenizer.get_vocab()]:
        raise UserError(f"{known[0]!r} is a word that the base knows already")
    width = encoder.get_input_embeddings().embedding_dim
    if rows.shape[1] != width:
        raise UserError(f"the vectors of {token!r} are {rows.shape[1]} wide, the base's {width}")
    ids = add_tokens(tokenizer, tokens)
    with torch.random.fork_rng(devices=[]):
        size = max(encoder.get_input_embeddings().num_embeddings, ids[-1] + 1)
        encoder.resize_token_embeddings(size, mean_resizing=False)
    table = encoder.get_input_embeddings().weight
    table[ids] = rows.to(table)


def _tokens(token: str, vectors: int) -> list[str]:
    return [token, *(f"{token}_{place}" for place in range(1, vectors))]
