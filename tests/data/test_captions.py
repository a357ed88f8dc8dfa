"""A draw's caption is a pure function of seed, picture and draw."""

from __future__ import annotations

import math

from finetune.data import captions


def test_the_same_draw_has_the_same_caption_and_others_differ() -> None:
    texts = tuple("abcdefgh")
    first = [captions.draw(texts, 0, "0/a.png", number) for number in range(200)]
    assert first == [captions.draw(texts, 0, "0/a.png", number) for number in range(200)]
    assert first != [captions.draw(texts, 1, "0/a.png", number) for number in range(200)]
    assert first != [captions.draw(texts, 0, "0/b.png", number) for number in range(200)]
    assert set(first) == set(texts)


def test_dropout_drops_its_share() -> None:
    draws, rate = 4000, 0.3
    dropped = sum(captions.draw(("a",), 0, "0/a.png", number, rate) == "" for number in range(draws))
    assert abs(dropped - rate * draws) < 3 * math.sqrt(draws * rate * (1 - rate))


def test_no_dropout_drops_nothing() -> None:
    assert all(captions.draw(("a",), 0, "0/a.png", number) == "a" for number in range(1000))
