"""Long prompts are read in chunks as A1111 reads them, in training and in pictures alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st

from finetune.batch import Conditioning
from finetune.config.schema import ModelConfig, SamplerConfig
from finetune.families import load_family
from finetune.families.long_prompts import framed, read_units, split
from finetune.families.sd import SD
from finetune.randomness import generator
from finetune.sampling import arguments, inference, one
from finetune.tinyworld.tokenizer import LENGTH, build

ROOM = LENGTH - 2
TOKENIZER = build()
COMMA = TOKENIZER.convert_tokens_to_ids(",</w>")
WORDS = "a red blue star circle ring heart photo of on grass"
IDS: list[int] = TOKENIZER(WORDS, add_special_tokens=False).input_ids
LONG = "a red star on grass, " * 12  # 72 tokens, a comma every sixth


def load(folder: Path, chunks: int = 3) -> SD:
    family = load_family(ModelConfig(path=str(folder), prompt_chunks=chunks))
    assert isinstance(family, SD)
    family.require("text_encoder", "denoiser")
    return family


def lengths(ids: list[int], most: int = 9) -> list[int]:
    found = split(TOKENIZER, [[index] for index in ids], most)
    assert [index for chunk in found.chunks for index in chunk] == ids[: len(ids) - found.lost]
    return [len(chunk) for chunk in found.chunks]


def commas(*places: int, count: int) -> list[int]:
    return [COMMA if place in places else IDS[place % len(IDS)] for place in range(count)]


# ---- where a prompt is cut ---------------------------------------------------------------------------------------


def test_without_commas_chunks_are_full() -> None:
    assert lengths([]) == [0]
    assert lengths(commas(count=ROOM)) == [ROOM]
    assert lengths(commas(count=ROOM + 1)) == [ROOM, 1]
    assert lengths(commas(count=3 * ROOM - 2)) == [ROOM, ROOM, ROOM - 2]


def test_a_comma_of_the_last_twenty_tokens_ends_a_chunk() -> None:
    assert lengths(commas(9, ROOM - 5, count=ROOM + 1)) == [ROOM - 4, 5]
    assert lengths(commas(ROOM - 20, count=ROOM + 1)) == [ROOM - 19, 20]
    assert lengths(commas(ROOM - 21, count=ROOM + 1)) == [ROOM, 1]
    assert lengths(commas(ROOM - 1, count=ROOM + 1)) == [ROOM, 1]
    assert lengths(commas(5, count=ROOM)) == [ROOM]  # all of it fits
    assert lengths(commas(5, ROOM, count=ROOM + 1)) == [ROOM, 1]  # the next token is a comma: as A1111 has it


def test_the_last_chunk_is_filled_and_the_rest_lost() -> None:
    assert lengths(commas(ROOM - 5, count=ROOM + 9), most=1) == [ROOM]
    assert lengths(commas(ROOM - 5, ROOM + 9, count=3 * ROOM), most=2) == [ROOM - 4, ROOM]
    assert split(TOKENIZER, [[index] for index in commas(ROOM - 5, count=3 * ROOM)], 2).lost == ROOM + 4


def test_a_word_of_several_vectors_moves_to_the_next_chunk_whole() -> None:
    ordinary = [[index] for index in IDS * 5]
    units = [*ordinary[: ROOM - 2], [-1, -2, -3], *ordinary[:4]]
    assert split(TOKENIZER, units, 3).chunks[1][:4] == [-1, -2, -3, IDS[0]]
    assert split(TOKENIZER, units, 1) == ([[*IDS[:11], *IDS[: ROOM - 13], -1, -2]], 5)
    monster = split(TOKENIZER, [[1], [-1] * (ROOM + 3)], 4)
    assert (len(monster.chunks), monster.lost) == (2, 3)


@given(
    st.lists(
        st.one_of(st.just([COMMA]), st.just([IDS[1]]), st.integers(2, 6).map(lambda size: [-size] * size)), max_size=90
    ),
    st.integers(1, 4),
)
def test_nothing_is_lost_twice_or_cut_apart(units: list[list[int]], most: int) -> None:
    found = split(TOKENIZER, units, most)
    whole = [index for unit in units for index in unit]
    assert [index for chunk in found.chunks for index in chunk] == whole[: len(whole) - found.lost]
    assert 1 <= len(found.chunks) <= most
    assert all(len(chunk) <= ROOM for chunk in found.chunks)
    assert not found.lost or len(found.chunks) == most
    if not found.lost:
        ends, done = set(), 0
        for unit in units:
            done += len(unit)
            ends.add(done)
        starts = torch.tensor([len(chunk) for chunk in found.chunks]).cumsum(0).tolist()
        assert set(starts) - {0} <= ends


def test_new_words_are_found_in_their_tokens_and_foreseen_before_they_are_added() -> None:
    tokenizer = build()
    ahead = read_units(tokenizer, "a <zib> star, <zib>", {"<zib>": 3})
    tokenizer.add_tokens(["<zib>", "<zib>_1", "<zib>_2"])
    now = read_units(tokenizer, "a <zib> <zib>_1 <zib>_2 star, <zib> <zib>_1 <zib>_2")
    assert [len(unit) for unit in now] == [len(unit) for unit in ahead] == [1, 3, 1, 1, 3]


@pytest.mark.parametrize("text", ["", "a red star", LONG])
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!</w>"])  # of SD 1 and of SD 2
def test_one_chunk_is_what_the_tokenizer_makes(text: str, pad: str) -> None:
    tokenizer = build()
    tokenizer.pad_token = pad
    ids, real = framed(tokenizer, split(tokenizer, read_units(tokenizer, text), 1).chunks)
    expected = tokenizer(text, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(ids, expected.input_ids)
    assert torch.equal(real, expected.attention_mask)


# ---- what is encoded ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["tiny_sd", "tiny_sd_v"])
def test_chunks_are_encoded_alone_and_stand_one_behind_the_other(base: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(base)
    family, one_chunk = load(folder, 4), load(folder, 1)
    parts = ["a red star on grass, " * 3, "a red star on grass, " * 3, "a blue ring on grass"]
    assert [family.prompt_length(text) for text in ("".join(parts), "a", "")] == [3 * LENGTH, LENGTH, LENGTH]
    whole = family.encode_prompt(["".join(parts)]).tokens
    apart = [one_chunk.encode_prompt([text]).tokens for text in parts]
    torch.testing.assert_close(whole, torch.cat(apart, 1), rtol=1e-5, atol=1e-6)
    assert family.caption_overflow("".join(parts)) == 0
    assert load(folder, 2).caption_overflow("".join(parts)) == 6 * 6 + 5 - 18 - ROOM


def test_prompts_of_a_batch_keep_their_lengths(tiny_sd: Path) -> None:
    family = load(tiny_sd, 4)
    captions = ["a red star", LONG, "", "a blue star on grass, " * 5]
    together = family.encode_prompt(captions)
    assert together.lengths == (LENGTH, 4 * LENGTH, LENGTH, 2 * LENGTH)
    for row, caption in enumerate(captions):
        alone, got = family.encode_prompt([caption]), together.rows(torch.tensor([row]))
        assert alone.lengths is None and got.lengths is None
        torch.testing.assert_close(got.tokens, alone.tokens, rtol=1e-5, atol=1e-6)


def test_every_chunk_has_a_gradient(tiny_sd: Path) -> None:
    family = load(tiny_sd)
    table = family.networks["text_encoder"].get_input_embeddings().weight.requires_grad_()  # type: ignore[operator]
    star, circle = (TOKENIZER(word, add_special_tokens=False).input_ids[0] for word in ("star", "circle"))
    family.encode_prompt(["star " * ROOM + "circle"]).tokens.square().sum().backward()
    assert table.grad[star].any() and table.grad[circle].any()


def test_a_new_word_is_whole_in_training_and_in_the_pipeline(tiny_sd: Path) -> None:
    family = load(tiny_sd)
    vocabulary = family.sites.vocabularies[0]
    ids = vocabulary.add("<zib>", 4)
    family.networks["text_encoder"].resize_token_embeddings(ids[-1] + 1, mean_resizing=False)  # type: ignore[operator]
    caption = "red " * (ROOM - 2) + "<zib> star"
    encoded = family.encode_prompt([caption]).tokens
    apart = [family.encode_prompt([text]).tokens for text in ("red " * (ROOM - 2), "<zib> star")]
    torch.testing.assert_close(encoded, torch.cat(apart, 1), rtol=1e-5, atol=1e-6)
    with inference(family) as pipeline:
        assert torch.equal(pipeline.encode_prompt(caption, "cpu", 1, False)[0], encoded)


# ---- stacks of unlike lengths ------------------------------------------------------------------------------------


def prompts(length: int, count: int = 1) -> Conditioning:
    values = torch.arange(1.0, count * length * 2 + 1).view(count, length, 2)
    return Conditioning(tokens=values, pooled=values[:, 0], mask=torch.ones(count, length, dtype=torch.bool))


def test_stacked_prompts_of_unlike_lengths_come_apart_again() -> None:
    parts = [prompts(2), prompts(5, 2), prompts(3)]
    whole = Conditioning.stack(parts)
    assert whole.lengths == (2, 5, 5, 3)
    assert whole.tokens.shape == (4, 5, 2) and whole.mask is not None
    assert whole.mask.sum(1).tolist() == [2, 5, 5, 3]
    assert torch.equal(whole.rows(torch.tensor([0])).tokens, parts[0].tokens)
    some = whole.rows(torch.tensor([True, False, False, True]))
    assert some.lengths == (2, 3) and some.tokens.shape == (2, 3, 2)
    again = Conditioning.stack([whole.rows(torch.tensor([3])), some])
    assert again.lengths == (3, 2, 3)
    assert torch.equal(again.tokens[0], parts[2].tokens[0]) and torch.equal(again.tokens[2], again.tokens[0])
    assert Conditioning.stack([prompts(3), prompts(3)]).lengths is None
    assert whole.to("cpu").lengths == whole.lengths


# ---- pictures ----------------------------------------------------------------------------------------------------


def drawn(pipeline: StableDiffusionPipeline, **asked: object) -> torch.Tensor:
    asked = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent", **asked}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(generator=generator(0, "picture"), **asked).images


def test_short_prompts_are_drawn_as_diffusers_draws_them(tiny_sd: Path) -> None:
    family = load(tiny_sd)
    with inference(family) as pipeline, inference(load(tiny_sd, 1)) as plain:
        prompts = ["a red star", "a blue ring"]
        pictures = [drawn(pipe, prompt=prompts, negative_prompt=["a", "b"]) for pipe in (pipeline, plain)]
    assert torch.equal(*pictures)


def test_long_prompts_are_drawn_with_what_training_reads(tiny_sd: Path) -> None:
    family = load(tiny_sd)
    with inference(family) as pipeline:
        encoded, empty = family.encode_prompt([LONG]).tokens, family.encode_prompt([""]).tokens
        got, away = pipeline.encode_prompt(LONG, "cpu", 1, True)
        assert torch.equal(got, encoded)
        assert torch.equal(away, torch.cat([empty] * 3, 1))
        by_hand = drawn(pipeline, prompt_embeds=encoded, negative_prompt_embeds=away)
        assert torch.equal(drawn(pipeline, prompt=LONG), by_hand)
        both, _ = pipeline.encode_prompt([LONG, "a"], "cpu", 2, False)
        assert both.shape == (4, 3 * LENGTH, 16) and torch.equal(both[1:2], encoded)
        short = family.encode_prompt(["a"]).tokens
        torch.testing.assert_close(both[2:3], torch.cat([short, empty, empty], 1), rtol=1e-5, atol=1e-6)
    cut, whole = (
        one(pipe, LONG + ", blue", arguments(family, pipe, SamplerConfig(steps=2)), generator(0, "a"))
        for pipe in (load(tiny_sd, 1).pipeline(), load(tiny_sd, 4).pipeline())
    )
    assert cut.tobytes() != whole.tobytes()


def test_attention_takes_a_prompt_several_times_over_for_the_prompt(tiny_sd: Path) -> None:
    """Why the prompt that guides away may be made longer by repeating it."""
    family, geometry = load(tiny_sd), torch.zeros(1, 6, dtype=torch.int64)
    empty = family.encode_prompt([""]).tokens
    noisy = torch.randn(1, 4, 8, 8, generator=generator(0, "noise"))
    answers = [
        family.predict(noisy, torch.tensor([500]), Conditioning(tokens=torch.cat([empty] * times, 1)), geometry)
        for times in (1, 3)
    ]
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-5)
