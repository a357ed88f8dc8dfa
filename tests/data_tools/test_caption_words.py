"""Where the trigger goes, and what a template may say."""

from __future__ import annotations

import pytest

from data_tools.captioning.words import Wording, has_words
from finetune.errors import UserError


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog on the beach", "a zib dog on the beach"),
        ("an old dog and a dog", "an old zib dog and a dog"),
        ("Dog in the snow", "zib Dog in the snow"),
        ("two dogs, one hotdog", "zib, two dogs, one hotdog"),
        ("a cat", "zib, a cat"),
        ("a Zib dog", "a Zib dog"),
        ("zibbering", "zib, zibbering"),
    ],
)
def test_the_trigger_stands_before_the_class_word_or_else_first(caption: str, expected: str) -> None:
    assert Wording("zib", "dog")(caption) == expected


@pytest.mark.parametrize(
    ("trigger", "class_word", "caption", "expected"),
    [
        ("zib", "owl", "an owl", "a zib owl"),
        ("zib", "owl", "An owl", "A zib owl"),
        ("ohwx", "dog", "a dog", "an ohwx dog"),
        ("ohwx", "dog", "a small dog", "a small ohwx dog"),
        ("zib", "owl", "than owl", "than zib owl"),
        ("<zib>", "teddy bear", "a teddy bear", "a <zib> teddy bear"),
    ],
)
def test_an_article_before_the_class_word_becomes_the_triggers(
    trigger: str, class_word: str, caption: str, expected: str
) -> None:
    assert Wording(trigger, class_word)(caption) == expected


def test_a_template_stands_around_it() -> None:
    assert Wording()("a dog") == "a dog"
    assert Wording("zib")("a dog") == "zib, a dog"
    assert Wording(template="{caption}, best quality")("a dog") == "a dog, best quality"
    assert Wording("zib", "dog", "a photo of {caption}")("a dog") == "a photo of a zib dog"
    assert Wording("zib", template="{caption}, in the style of {trigger}")("a dog") == "a dog, in the style of zib"
    assert Wording()("a {trigger} in braces") == "a {trigger} in braces"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"template": "a photo"}, "has no {caption}"),
        ({"template": "{captoin}"}, "{captoin} is unknown; did you mean 'caption'"),
        ({"template": "{caption} {trigger}"}, "there is no --trigger"),
        ({"template": "{caption} {"}, "cannot be read"),
        ({"template": "{caption!r}"}, "expected {caption} and {trigger}, and no more in braces"),
        ({"template": "{caption.__class__}"}, "{caption.__class__} is unknown"),
        ({"trigger": "zib", "class_word": "dog", "template": "{trigger} {caption}"}, "leave one of them out"),
        ({"class_word": "dog"}, "there is no --trigger"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        Wording(**arguments)
    assert message in str(refused.value)


def test_marks_alone_are_no_caption() -> None:
    assert has_words("犬") and has_words("1girl")
    assert not has_words("") and not has_words(" .,! ")
