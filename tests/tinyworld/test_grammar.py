import pytest

from finetune.errors import UserError
from finetune.tinyworld import captions, world
from finetune.tinyworld.captions import RARE, caption, compose, parse
from finetune.tinyworld.world import FACTORS, Scene


def test_what_a_caption_names_can_be_read_back_from_it() -> None:
    for index in range(500):
        scene = Scene.draw(5, index)
        text, named = caption(scene.factors, world.rng("read back", index))
        assert parse(text) == named
        assert named.items() <= scene.factors.items()


def test_every_word_of_every_caption_is_in_the_vocabulary() -> None:
    known = set(captions.words())
    for index in range(500):
        text, _ = caption(Scene.draw(5, index).factors, world.rng("words", index))
        assert set(text.split()) <= known


def test_all_factors_are_left_out_sometimes_and_named_sometimes() -> None:
    named = [caption(Scene.draw(5, index).factors, world.rng("some", index))[1] for index in range(800)]
    for name in FACTORS:
        share = sum(name in each for each in named) / len(named)
        assert 0.3 < share < 0.995
    assert sum(list(each) == ["shape"] for each in named) > 20


def test_rare_words_stand_in_a_few_captions_only() -> None:
    texts = [caption(Scene.draw(5, index).factors, world.rng("rare", index))[0] for index in range(4000)]
    share = sum(any(word in RARE for word in text.split()) for text in texts) / len(texts)
    assert 0.004 < share < 0.02


def test_compose_says_exactly_what_it_is_given() -> None:
    named = {"shape": "star", "colour": "orange", "background": "on grass", "position": "at the left"}
    assert compose(named) == "an orange star on grass at the left"
    assert compose(named, token="zib", opening="a photo of ") == "a photo of an orange zib star on grass at the left"
    assert compose({}) == "a shape"


def test_two_values_of_one_factor_are_refused() -> None:
    with pytest.raises(UserError, match="colour: red and blue"):
        parse("a red blue star")
