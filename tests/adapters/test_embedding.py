"""New words: the tokens that they are, how they begin, and where they stand in a prompt (METHODS 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from new_words import attached, config, encoded, rows, spread

from finetune.adapters import attach
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import load_family
from finetune.tinyworld.tokenizer import build

# METHODS 2.9


def test_a_word_of_three_vectors_is_three_tokens(tiny_sd: Path) -> None:
    """METHODS 2.9: "a <t> <t>_1 <t>_2 x" encodes to [bos, a, id0, id1, id2, x, eos]; 0.2 fact 12."""
    family, adapter = attached(tiny_sd, {"token": "<t>", "vectors": 3})
    (vocabulary,) = family.sites.vocabularies
    tokenizer, known = vocabulary.tokenizer, len(build())
    ids = tokenizer.convert_tokens_to_ids
    expected = [ids("a</w>"), known, known + 1, known + 2, ids("star</w>")]
    assert tokenizer("a <t> <t>_1 <t>_2 star").input_ids == [tokenizer.bos_token_id, *expected, tokenizer.eos_token_id]
    assert vocabulary.expand("a <t> star") == "a <t> <t>_1 <t>_2 star"
    assert adapter.tables["text_encoder"].first == known


@pytest.mark.parametrize("token", ["<t>", "<t>_1", "star", "<|endoftext|>"])
def test_a_word_that_is_known_is_refused(tiny_sd: Path, token: str) -> None:
    """METHODS 2.9 and 2.8: adding a token twice, or a word of the model, is an error."""
    family, _ = attached(tiny_sd, {"token": "<t>", "vectors": 2})
    size = len(family.sites.vocabularies[0].tokenizer)
    with pytest.raises(UserError, match="is a word that the model knows"):
        attach(config({"token": token}), family, 0)
    assert len(family.sites.vocabularies[0].tokenizer) == size


def test_a_word_that_is_part_of_another_is_refused(tiny_sd: Path) -> None:
    family = load_family(ModelConfig(path=str(tiny_sd)))
    attach(config({"token": "<t>"}), family, 0)
    with pytest.raises(UserError, match="cannot be told from"):
        attach(config({"token": "a<t>b"}), family, 0)


def test_before_training_a_word_is_its_initializer(tiny_sd: Path) -> None:
    """METHODS 2.9: the encoder's output is bit-equal to that of the initializer's prompt."""
    family = load_family(ModelConfig(path=str(tiny_sd)))
    family.require("text_encoder")
    before = encoded(family, "a red star on grass")
    attach(config({"token": "<t>", "initializer": "star"}), family, 0)
    assert torch.equal(encoded(family, "a red <t> on grass"), before)
    assert torch.equal(encoded(family, "a red star on grass"), before)


def test_every_vector_counts(tiny_sd: Path) -> None:
    """METHODS 2.9: outputs differ where only the second vector is perturbed."""
    family, adapter = attached(tiny_sd, {"token": "<t>", "vectors": 3, "initializer": "red star"})
    before = encoded(family, "a <t>", "a star")
    with torch.no_grad():
        rows(adapter)[1] += 0.1
    after = encoded(family, "a <t>", "a star")
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


@pytest.mark.parametrize("stored_end", [2, None])
def test_the_pooled_output_is_that_of_the_end(tiny_sd: Path, tmp_path: Path, stored_end: int | None) -> None:
    """METHODS 2.9 and 0.2 fact 2: also where the settings say eos_token_id 2, as Stable Diffusion's do."""
    family = load_family(ModelConfig(path=str(tiny_sd)))
    family.require("text_encoder")
    encoder: Any = family.networks["text_encoder"]
    if stored_end is not None:
        encoder.eos_token_id = encoder.config.eos_token_id = stored_end
    attach(config({"token": "<t>", "vectors": 2}), family, 0)
    tokenizer = family.sites.vocabularies[0].tokenizer
    ids = tokenizer("a <t> <t>_1 star", return_tensors="pt", padding="max_length").input_ids
    end = ids[0].tolist().index(tokenizer.eos_token_id)
    output = encoder(ids)
    assert end == 5
    assert torch.equal(output.pooler_output[0], output.last_hidden_state[0, end])
    assert encoder.config.eos_token_id == tokenizer.eos_token_id


# METHODS 2.1


def test_initializers_are_taken_in_turn(tiny_sd: Path) -> None:
    """METHODS 2.1: ids[i % len] over the vectors."""
    family, adapter = attached(tiny_sd, {"token": "<t>", "vectors": 5, "initializer": "red star"})
    tokenizer, encoder = family.sites.vocabularies[0].tokenizer, family.fresh("text_encoder")
    ids = tokenizer.convert_tokens_to_ids(["red</w>", "star</w>"])
    assert torch.equal(rows(adapter), encoder.get_input_embeddings().weight[[ids[i % 2] for i in range(5)]])


@pytest.mark.parametrize(("words", "hint"), [("red stra", "'star'"), ("labradoodle", "la"), (" ", "no word")])
def test_unknown_initializers_are_refused(tiny_sd: Path, words: str, hint: str) -> None:
    family = load_family(ModelConfig(path=str(tiny_sd)))
    with pytest.raises(UserError, match=hint):
        attach(config({"token": "<t>", "initializer": words}), family, 0)


def test_random_starts_are_named_and_spread_like_the_table(tiny_sd: Path) -> None:
    family, one = attached(tiny_sd, {"token": "<t>", "vectors": 8}, {"token": "<u>", "vectors": 8})
    _, alone = attached(tiny_sd, {"token": "<u>", "vectors": 8})
    _, other = attached(tiny_sd, {"token": "<u>", "vectors": 8}, seed=1)
    state = torch.random.get_rng_state()
    attached(tiny_sd, {"token": "<u>", "vectors": 8})
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(rows(one)[8:], rows(alone))  # whatever other words there are
    assert not torch.equal(rows(alone), rows(other))
    table = family.networks["text_encoder"].get_input_embeddings().weight
    assert spread(rows(one)) == pytest.approx(spread(table), rel=0.15)


@pytest.mark.parametrize("caption", ["a <t> star", "<t>", "a <t> and <t> <u>", "<u><t>", "a star", ""])
def test_captions_are_expanded_as_diffusers_does(tiny_sd: Path, caption: str) -> None:
    """METHODS 2.1: what is trained is what a pipeline of diffusers draws with."""
    family, _ = attached(tiny_sd, {"token": "<t>", "vectors": 3}, {"token": "<u>", "vectors": 2})
    (vocabulary,), pipeline = family.sites.vocabularies, family.pipeline()
    inherited = type(pipeline).maybe_convert_prompt(pipeline, caption, vocabulary.tokenizer)
    assert vocabulary.expand(caption) == inherited
    assert torch.equal(pipeline.encode_prompt(caption, torch.device("cpu"), 1, False)[0], encoded(family, caption))


@pytest.mark.parametrize("vectors", [1, 5])
def test_the_count_of_tokens_is_right_before_and_after_the_word_is_known(tiny_sd: Path, vectors: int) -> None:
    family = load_family(ModelConfig(path=str(tiny_sd)))
    words = {"<t>": vectors}
    captions = ["a <t> " + "red " * count for count in (3, 16, 17, 20, 21, 40)] + ["<t> and <t>", "<t><t>"]
    before = [family.caption_overflow(caption, words) for caption in captions]
    attach(config({"token": "<t>", "vectors": vectors}), family, 0)
    (vocabulary,) = family.sites.vocabularies
    for caption, lost in zip(captions, before, strict=True):
        count = len(vocabulary.tokenizer(vocabulary.expand(caption)).input_ids)
        assert lost == family.caption_overflow(caption, words) == max(0, count - 24)
    assert before[-3] > 0
