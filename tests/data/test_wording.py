"""What draws make of captions: kohya's steps in kohya's order, and nothing that the run's own list lacks."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.config.checks import contradictions
from finetune.config.schema import DataConfig, Recipe
from finetune.config.wording import WordingConfig
from finetune.data import Batches, captions, prepare, scan, wording
from finetune.errors import UserError

Make = Callable[..., Recipe]
Folder = Callable[..., Path]
TAGS = "zib star, red, blue, green, black, white"
VARIED: dict[str, Any] = {"shuffle": True, "keep_tokens": 1, "tag_dropout": 0.3, "prefix": "art,"}


def draws(text: str, count: int = 200, seed: int = 0, step: int = 10**6, **keys: object) -> list[str]:
    config = WordingConfig.model_validate(keys)
    return [captions.draw((text,), seed, "0/a.png", number, 0.0, config, step) for number in range(count)]


def once(text: str, step: int = 10**6, **keys: object) -> str:
    """Of what is the same in every draw."""
    found = set(draws(text, 20, step=step, **keys))
    assert len(found) == 1
    return found.pop()


def test_nothing_set_leaves_a_caption_as_it_is() -> None:
    assert once("a  photo,of zib") == "a photo,of zib"
    assert captions.draw(("a  photo",), 0, "0/a.png", 3) == "a  photo"  # without the section not even spaces change


def test_the_same_draw_has_the_same_words_and_others_differ() -> None:
    keys: dict[str, Any] = {"shuffle": True, "tag_dropout": 0.2, "wildcards": True}
    text = TAGS + ", {a|b|c}"
    assert draws(text, **keys) == draws(text, **keys)
    assert draws(text, **keys) != draws(text, seed=1, **keys)
    assert len(set(draws(text, **keys))) > 100


def test_fixed_tags_survive_200_shuffles_and_no_tag_is_lost() -> None:
    found = draws(TAGS, shuffle=True, keep_tokens=2)
    assert {text.split(", ")[0] + "|" + text.split(", ")[1] for text in found} == {"zib star|red"}
    assert {tuple(sorted(text.split(", "))) for text in found} == {tuple(sorted(TAGS.split(", ")))}
    assert len(set(found)) == 24  # all orders of the other four


def test_every_order_is_as_likely_as_another() -> None:
    counts = Counter(draws("a, b, c", 3000, shuffle=True))
    assert len(counts) == 6
    sigma = math.sqrt(3000 * 1 / 6 * 5 / 6)
    assert all(abs(count - 500) < 4 * sigma for count in counts.values())


def test_a_mark_fixes_the_tags_before_it_and_those_behind_a_second_one() -> None:
    text = "zib, star ||| a, b, c ||| last"
    found = draws(text, shuffle=True, keep_tokens_separator="|||", keep_tokens=1)
    assert all(one.startswith("zib, star, ") and one.endswith(", last") for one in found)
    assert len(set(found)) == 6
    assert once(text, keep_tokens_separator="|||") == "zib, star, a, b, c, last"
    unmarked = draws("zib, a, b", shuffle=True, keep_tokens_separator="|||", keep_tokens=1)
    assert set(unmarked) == {"zib, a, b", "zib, b, a"}


def test_tag_dropout_of_0_keeps_all_and_of_1_leaves_the_fixed_ones() -> None:
    assert once(TAGS, tag_dropout=1.0, keep_tokens=1) == "zib star"
    assert once(TAGS, tag_dropout=1.0) == ""
    assert once(TAGS, tag_dropout=0.0, tag_warmup_steps=1) == TAGS


def test_tag_dropout_drops_its_share_of_each_tag_alone() -> None:
    count, rate = 3000, 0.25
    found = [set(text.split(", ")) for text in draws("fixed, a, b, c", count, tag_dropout=rate, keep_tokens=1)]
    for tag in "abc":
        assert abs(sum(tag not in tags for tags in found) - rate * count) < 3 * math.sqrt(count * rate * (1 - rate))
    both = sum("a" not in tags and "b" not in tags for tags in found)
    assert abs(both - rate**2 * count) < 3 * math.sqrt(count * rate**2 * (1 - rate**2))


def test_tags_in_use_grow_from_the_first_flexible_one_to_all() -> None:
    text = "fixed, a, b, c, d, e"
    lengths = [len(once(text, step, tag_warmup_steps=8, keep_tokens=1).split(", ")) - 1 for step in range(12)]
    assert lengths == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5, 5]
    assert once(text, 0, tag_warmup_steps=8, keep_tokens=1) == "fixed, a"
    assert once("fixed", 0, tag_warmup_steps=8, keep_tokens=1) == "fixed"


def test_wildcards_take_each_option_as_often() -> None:
    counts = Counter(draws("a {red|dark blue|green} star", 3000, wildcards=True))
    assert set(counts) == {"a red star", "a dark blue star", "a green star"}
    assert all(abs(count - 1000) < 3 * math.sqrt(3000 * 2 / 9) for count in counts.values())


def test_two_wildcards_of_a_caption_choose_apart() -> None:
    assert len(set(draws("{a|b} {a|b}", wildcards=True))) == 4


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a {{b|c}} d", {"a {b|c} d"}),
        (r"a \{b|c\} d", {"a {b|c} d"}),
        (r"{a\|b|c}", {"a|b", "c"}),
        (r"{a\}|b}", {"a}", "b"}),
        ("{{{a|b}}}", {"{a}", "{b}"}),
        ("{one}", {"one"}),
        ("a {very |}big star", {"a very big star", "a big star"}),
        ("a {b|c", {"a {b|c"}),
        ("{} b} c", {"{} b} c"}),
        (r"smile \(wide\)", {r"smile \(wide\)"}),
    ],
)
def test_wildcards_that_are_escaped_empty_or_open(text: str, found: set[str]) -> None:
    assert set(draws(text, wildcards=True)) == found
    assert set(draws(text)) == {text}


def test_a_wildcard_may_bring_several_tags() -> None:
    """They are chosen before the caption is split."""
    assert set(draws("zib, {a, b|c}", wildcards=True, tag_dropout=0.0, shuffle=True, keep_tokens=2)) == {
        "zib, a, b",
        "zib, c",
    }


def test_a_prefix_is_dropped_with_the_whole_caption() -> None:
    config = WordingConfig(prefix="zib star,", suffix="photo", shuffle=True, keep_tokens=1)
    count, rate = 4000, 0.3
    found = [captions.draw(("a, b",), 0, "0/a.png", number, rate, config, 0) for number in range(count)]
    assert abs(found.count("") - rate * count) < 3 * math.sqrt(count * rate * (1 - rate))
    assert all(text.startswith("zib star, ") for text in found if text)
    kept = [captions.draw(("a",), 0, "0/a.png", number, rate) == "" for number in range(count)]
    assert kept == [text == "" for text in found]  # wording moves no other draw


def test_a_prefix_is_a_tag_like_others_and_kept_where_keep_tokens_covers_it() -> None:
    assert all(text.startswith("zib star, ") for text in draws(TAGS, prefix="zib star,", shuffle=True, keep_tokens=1))
    assert not all(text.startswith("zib star") for text in draws(TAGS, prefix="zib star,", shuffle=True))
    assert once("a, b", prefix="zib,", tag_dropout=1.0, keep_tokens=1) == "zib"
    assert once("a dog", prefix="photo of", suffix="in the snow") == "photo of a dog in the snow"


def test_parts_of_a_tag_stay_together_and_are_separated_at_the_end() -> None:
    found = draws("zib, a;;b, c", shuffle=True, keep_tokens=1, secondary_separator=";;")
    assert set(found) == {"zib, a, b, c", "zib, c, a, b"}


def test_replacements_come_last() -> None:
    assert once("a NAME", replacements={"NAME": "zib, star"}, tag_dropout=1.0) == ""
    assert once("NAME, b", replacements={"NAME": "zib, star"}, keep_tokens=1, tag_dropout=1.0) == "zib, star"
    assert once("a {b}", replacements={"b": "{c|d}"}, wildcards=True) == "a {c|d}"
    assert once("a;;b", secondary_separator=";;", replacements={", ": " and "}) == "a and b"
    assert once("a", replacements={"a": "b", "b": "c"}) == "c"  # one after the other


def test_another_separator() -> None:
    assert set(draws("a, b; c", separator=";", shuffle=True)) == {"a, b; c", "c; a, b"}
    assert set(draws("a b", separator=" ", shuffle=True)) == {"a b", "b a"}


@given(st.lists(st.text(st.characters(exclude_characters=",", codec="ascii"), min_size=1), max_size=8), st.integers(0))
def test_shuffling_only_moves_tags(tags: list[str], number: int) -> None:
    config = WordingConfig(shuffle=True, keep_tokens=1)
    text = ",".join(tags)
    found = captions.draw((text,), 0, "0/a.png", number, 0.0, config)
    own = [words for tag in tags if (words := " ".join(tag.split()))]
    assert sorted(found.split(", ")) == sorted(own or [""])
    assert found.split(", ")[0] == (own or [""])[0]


def test_previews_show_the_first_option_and_all_tags() -> None:
    config = WordingConfig(prefix="zib,", shuffle=True, tag_dropout=0.9, tag_warmup_steps=9, wildcards=True)
    assert wording.plain("a, {b|c}, d", config) == "zib, a, b, d"
    assert wording.plain("a  b", None) == "a  b"


@pytest.mark.parametrize("prior", [{"kind": "none"}, {"kind": "images", "count": 4, "sampler": {"steps": 1}}])
def test_every_caption_of_a_run_is_encoded_ahead_and_the_text_encoder_freed(
    prior: dict[str, Any], make_recipe: Make, folder: Folder, fake: Any
) -> None:
    family = fake()
    recipe = worded_recipe(make_recipe, folder(3), prior=prior)
    batches = prepare(recipe, family)
    ahead, made = set(batches.final_captions), len(family.captions)
    drawn = [text for batch in itertools.islice(batches, 24) for text in batch.captions]
    assert set(drawn) <= ahead
    assert ahead - set(drawn) <= {""}
    assert len(family.captions) == made == len(ahead)  # nothing was encoded while training
    assert set(family.networks) == {"denoiser"}
    if prior["kind"] == "images":
        assert Counter(drawn)["a star"] == 48  # class captions are never touched


def worded_recipe(make: Make, photos: Path, prior: dict[str, Any] | None = None, **data: Any) -> Recipe:
    for index in range(3):
        (photos / f"{index}.txt").write_text(f"zib, number {index}, a, b, {{c|d}}")
    train = {"steps": 12, "batch_size": 2, "gradient_accumulation_steps": 2}
    words = {**VARIED, "wildcards": True, "tag_warmup_steps": 6}
    return make(photos, data={"wording": words, "caption_dropout": 0.2, **data}, train=train, prior=prior)


def test_captions_are_the_same_cached_or_not_shared_out_or_resumed(
    make_recipe: Make, folder: Folder, fake: Any
) -> None:
    recipe = worded_recipe(make_recipe, folder(3))
    whole = run(prepare(recipe, fake()))
    uncached = recipe.data.model_copy(update={"cache": recipe.data.cache.model_copy(update={"text": False})})
    assert run(prepare(recipe.model_copy(update={"data": uncached}), fake())) == whole
    resumed = list(itertools.islice(prepare(recipe, fake()).from_step(5), 2))
    assert [batch.captions for batch in resumed] == [captions for _, captions in whole[10:12]]
    one = recipe.train.model_copy(update={"batch_size": 1, "gradient_accumulation_steps": 4})
    drawn = [
        sorted(pair for numbers, texts in run(prepare(other, fake())) for pair in zip(numbers, texts, strict=True))
        for other in (recipe, recipe.model_copy(update={"train": one}))
    ]
    assert drawn[0] == drawn[1]


def run(batches: Batches) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
    count = 12 * batches.share.accumulation
    return [(batch.draws, batch.captions) for batch in itertools.islice(batches, count)]


def test_what_is_the_same_in_every_draw_is_listed_without_drawing(
    make_recipe: Make, folder: Folder, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wording, "MOST", 1)
    recipe = make_recipe(folder(2), data={"wording": {"prefix": "art of", "replacements": {"photo": "picture"}}})
    assert prepare(recipe, fake()).final_captions == [f"art of a picture of zib number {index}" for index in range(2)]


def test_too_many_captions_to_encode_ahead_are_refused_unless_the_encoder_stays(
    make_recipe: Make, folder: Folder, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wording, "MOST", 5)
    photos = folder(3)
    with pytest.raises(UserError, match=r"more than 5 different captions .* set data\.cache\.text: false"):
        prepare(worded_recipe(make_recipe, photos), fake())
    family = fake()
    batches = prepare(worded_recipe(make_recipe, photos, cache={"text": False}), family)
    assert "text_encoder" in family.networks
    assert batches.describe()["captions"] == 6  # five of them, and the empty one
    assert len(run(batches)) == 24


def test_a_plan_lists_captions_before_there_are_class_images(make_recipe: Make, folder: Folder, fake: Any) -> None:
    from finetune.data.encode import Latents, Prompts
    from finetune.data.prior import foreseen

    photos = folder(3)
    for layout in ("pairwise", "mixed"):
        prior = {"kind": "images", "count": 4, "sampler": {"steps": 1}, "layout": layout}
        recipe, family = worded_recipe(make_recipe, photos, prior=prior), fake()
        parts = (Latents(family, recipe.data), Prompts(family, recipe.data))
        concepts = scan(recipe.data)
        planned = Batches(recipe, family, concepts, foreseen(recipe, concepts), *parts).final_captions
        assert {*planned, "a star"} == set(planned) == set(prepare(recipe, family).final_captions)


def test_words_and_triggers_count_as_draws_write_them(folder: Folder) -> None:
    photos = folder(2)
    concept = {"folder": str(photos), "trigger": "sks"}
    notes = [
        scan(DataConfig.model_validate({"concepts": [concept], "wording": words}))[0].notes
        for words in (None, {"replacements": {"zib": "sks"}}, {"prefix": "sks,"})
    ]
    assert ["lack" in " ".join(note) for note in notes] == [True, False, False]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"keep_tokens": 1}, "keep_tokens is set, but no tag"),
        ({"tag_warmup_steps": 1001}, "tag_warmup_steps must be at most the run's 1000 steps"),
        ({"keep_tokens_separator": "|,|"}, "keep_tokens_separator must not hold the separator"),
        ({"secondary_separator": ","}, "secondary_separator must not hold the separator"),
        ({"secondary_separator": "|", "keep_tokens_separator": "|"}, "secondary_separator must be another mark"),
    ],
)
def test_settings_that_cannot_be_meant(words: dict[str, Any], said: str, make_recipe: Make, folder: Folder) -> None:
    photos = folder(1)
    recipe = make_recipe(photos, data={"wording": words})
    found = [f"{one.path[-1]} {one.text}" for one in contradictions(recipe) if one.path[:2] == ("data", "wording")]
    assert len(found) == 1
    assert found[0].startswith(said)
    sound = make_recipe(photos, data={"wording": VARIED})
    assert not [one for one in contradictions(sound) if one.path[:2] == ("data", "wording")]


# ---- how tags are left out ---------------------------------------------------------------------------------------


def test_full_tag_dropout_leaves_out_all_flexible_tags_or_none() -> None:
    count, rate = 3000, 0.25
    found = Counter(draws("fixed, a, b", count, tag_dropout=rate, tag_dropout_mode="full", keep_tokens=1))
    assert set(found) == {"fixed", "fixed, a, b"}
    assert abs(found["fixed"] - rate * count) < 3 * math.sqrt(count * rate * (1 - rate))


def test_weighted_tag_dropout_rises_along_the_caption_whatever_the_order() -> None:
    """OneTrainer's: tag i of n with i / n of the rate, so that the first always stays."""
    count, rate = 3000, 0.8
    for shuffle in (False, True):
        keys: dict[str, Any] = {"tag_dropout": rate, "tag_dropout_mode": "weighted", "shuffle": shuffle}
        found = [set(text.split(", ")) for text in draws("fixed, a, b, c, d", count, keep_tokens=1, **keys)]
        for place, tag in enumerate("abcd"):
            share = rate * place / 4
            gone = sum(tag not in tags for tags in found)
            assert abs(gone - share * count) <= 3.5 * math.sqrt(count * share * (1 - share))


@pytest.mark.parametrize("mode", ["random", "full", "weighted"])
def test_listed_tags_stay_or_are_the_only_ones_to_go(mode: str) -> None:
    text = "first, Zib star, red eyes, blue eyes, [x] y, girl"
    keys: dict[str, Any] = {"tag_dropout": 1.0, "tag_dropout_mode": mode, "keep_tokens": 1}
    kept = draws(text, 300, tag_dropout_except=["zib *", "[x] ?"], **keys)
    assert all({"first", "Zib star", "[x] y"} <= set(one.split(", ")) for one in kept)
    assert min(map(len, kept)) == len("first, Zib star, [x] y")
    gone = draws(text, 300, tag_dropout_only=["* EYES"], **keys)
    assert all({"first", "Zib star", "[x] y", "girl"} <= set(one.split(", ")) for one in gone)
    assert min(map(len, gone)) == len("first, Zib star, [x] y, girl")


def test_a_listed_tag_that_is_nowhere_is_noted(make_recipe: Make, folder: Folder, fake: Any) -> None:
    photos = folder(2)
    (photos / "0.txt").write_text("zib, red eyes")
    words = {"tag_dropout": 0.5, "keep_tokens": 1, "tag_dropout_except": ["zib", "* eyes", "hat"]}
    (note,) = prepare(make_recipe(photos, data={"wording": words}), fake()).notes
    assert note == "tag_dropout: no tag of a caption is 'zib' or 'hat'"  # the fixed tag is none that could go
    words["wildcards"] = True
    assert not prepare(make_recipe(photos, data={"wording": words}), fake()).notes


def test_random_tag_dropout_draws_as_it_always_did() -> None:
    """The lists and modes move no draw of a recipe that does not name them."""
    keys: dict[str, Any] = {"shuffle": True, "keep_tokens": 1, "tag_dropout": 0.4}
    assert draws(TAGS, 4, **keys) == draws(TAGS, 4, tag_dropout_mode="random", tag_dropout_except=["none"], **keys)


# ---- epochs without captions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["none", "pairwise", "mixed"])
def test_every_nth_epoch_has_no_captions_but_class_images_keep_theirs(
    layout: str, make_recipe: Make, folder: Folder, fake: Any
) -> None:
    images = {"kind": "images", "count": 4, "sampler": {"steps": 1}, "layout": layout}
    prior = images if layout != "none" else {"kind": "none"}
    train = {"steps": 18, "batch_size": 2}
    family = fake()
    recipe = make_recipe(folder(3), data={"caption_dropout_every_n_epochs": 3}, prior=prior, train=train)
    batches = prepare(recipe, family)
    per_epoch = 6 if layout == "mixed" else 3  # draws
    seen = 0
    for batch in itertools.islice(batches, 18):
        assert batch.prompt is not None
        for number, text, of_class in zip(batch.draws, batch.captions, batch.prior.tolist(), strict=True):
            empty = (number // per_epoch) % 3 == 2 and not of_class
            assert (text == "") == empty
            seen += empty
    assert seen == {"none": 12, "pairwise": 12, "mixed": 6}[layout]
    assert "" in batches.final_captions and len(family.captions) == len(batches.final_captions)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"tag_dropout_mode": "full"}, "tag_dropout_mode is set, but tag_dropout is 0"),
        ({"tag_dropout_only": ["a"]}, "tag_dropout_only is set, but tag_dropout is 0"),
        (
            {"tag_dropout": 0.5, "tag_dropout_only": ["a"], "tag_dropout_except": ["b"]},
            "tag_dropout_except is set with tag_dropout_only",
        ),
    ],
)
def test_lists_that_contradict(words: dict[str, Any], said: str, make_recipe: Make, folder: Folder) -> None:
    found = contradictions(make_recipe(folder(1), data={"wording": words}))
    assert [f"{one.path[-1]} {one.text}"[: len(said)] for one in found if one.path[:2] == ("data", "wording")] == [said]
