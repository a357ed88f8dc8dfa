"""Rare tokens: which words a tokenizer knows whole, and what to say of a poor choice."""

from __future__ import annotations

import torch

from finetune.families.tokens import check_trigger, pieces, rare_tokens
from finetune.family import ModelFamily


def test_rare_tokens_are_short_single_and_ordered(tiny_family: ModelFamily) -> None:
    tokenizer = tiny_family.sites.vocabularies[0].tokenizer
    found = rare_tokens(tokenizer, count=8)
    assert len(found) == 8
    assert [token.id for token in found] == sorted((token.id for token in found), reverse=True)
    for token in found:
        assert 2 <= len(token.word) <= 4
        assert tokenizer(token.word, add_special_tokens=False).input_ids == [token.id]
        assert token.norm is None


def test_norms_are_of_the_embedding(tiny_family: ModelFamily) -> None:
    tokenizer = tiny_family.sites.vocabularies[0].tokenizer
    table = torch.arange(len(tokenizer)).float().view(-1, 1).expand(-1, 4)
    assert all(token.norm == 2 * token.id for token in rare_tokens(tokenizer, table, count=3))


def test_pieces_are_what_the_encoder_reads(tiny_family: ModelFamily) -> None:
    tokenizer = tiny_family.sites.vocabularies[0].tokenizer
    assert pieces(tokenizer, "red star") == ["red</w>", "star</w>"]
    assert len(pieces(tokenizer, "sksq")) == 4


def test_a_good_trigger_is_not_remarked_on(tiny_family: ModelFamily) -> None:
    rare = rare_tokens(tiny_family.sites.vocabularies[0].tokenizer, count=1)[0].word
    assert check_trigger(tiny_family, rare, "a star") == []
    assert check_trigger(tiny_family, rare, None) == []


def test_a_trigger_of_several_tokens_is_remarked_on(tiny_family: ModelFamily) -> None:
    (warning,) = check_trigger(tiny_family, "sksq", "a star")
    assert "4 tokens (s + k + s + q)" in warning


def test_a_trigger_in_the_class_prompt_is_remarked_on(tiny_family: ModelFamily) -> None:
    rare = rare_tokens(tiny_family.sites.vocabularies[0].tokenizer, count=1)[0].word
    (warning,) = check_trigger(tiny_family, rare, f"a {rare.upper()} star")
    assert "class prompt" in warning
    assert check_trigger(tiny_family, rare, f"a {rare}y star") == [], "only whole words count"
