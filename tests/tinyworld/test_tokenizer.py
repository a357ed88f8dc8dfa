import pytest

from finetune.tinyworld import captions, tokenizer


@pytest.fixture(scope="module")
def tok():  # type: ignore[no-untyped-def]
    return tokenizer.build()


def test_every_word_of_the_world_is_one_token(tok) -> None:  # type: ignore[no-untyped-def]
    ids = [tok(word).input_ids for word in captions.words()]
    assert all(len(each) == 3 for each in ids)
    assert len({each[1] for each in ids}) == len(ids)


@pytest.mark.parametrize("text", ["Zürich", "a dog, 3 cats!", "猫", "😀", "a\nb", "starstar", "<|"])
def test_any_text_encodes_and_comes_back(tok, text: str) -> None:  # type: ignore[no-untyped-def]
    ids = tok(text).input_ids
    assert (ids[0], ids[-1]) == (tok.bos_token_id, tok.eos_token_id)
    read = tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(read.split()) == "".join(text.lower().split())


def test_the_longest_caption_fits(tok) -> None:  # type: ignore[no-untyped-def]
    text = "a picture of a small checkered orange zib triangle in the centre in the sea in the style of zib"
    assert len(tok(text).input_ids) <= tokenizer.LENGTH


def test_padding_is_the_end_token_as_in_sd1(tok) -> None:  # type: ignore[no-untyped-def]
    ids = tok("a star", padding="max_length").input_ids
    assert len(ids) == tokenizer.LENGTH
    assert set(ids[3:]) == {tok.eos_token_id}


def test_saved_and_loaded_it_encodes_the_same(tok, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from transformers import CLIPTokenizer

    tok.save_pretrained(tmp_path)
    text = "a zib star on grass ümlaut 9"
    assert CLIPTokenizer.from_pretrained(tmp_path)(text).input_ids == tok(text).input_ids
