"""Templates around a new word, and captions that hold it (METHODS 2.6)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.config.adapters import EmbeddingConfig
from finetune.config.schema import Recipe
from finetune.data import prepare, scan
from finetune.data.batches import Batches
from finetune.data.templates import CAPTION, NAME, TEMPLATES, Wording, read_templates
from finetune.errors import UserError

Folder = Callable[..., Path]
MakeRecipe = Callable[..., Recipe]


def words(*tokens: str, **changes: Any) -> dict[str, Any]:
    named = [{"token": token} for token in tokens or ("<zib>",)]
    return {"kind": "embedding", "tokens": named, "templates": "object", **changes}


def config(*tokens: str, **changes: Any) -> EmbeddingConfig:
    return EmbeddingConfig.model_validate(words(*tokens, **changes))


def prepared(recipe: Recipe, fake: Any) -> Batches:
    return prepare(recipe, fake)


@pytest.mark.parametrize("source", TEMPLATES)
def test_shipped_templates_hold_the_word_once_and_say_nothing_twice(source: str) -> None:
    """METHODS 2.6: short statements that mention the thing once."""
    templates = read_templates(source)
    assert len(set(templates)) == len(templates) >= 8
    assert all(template.count(NAME) == 1 and CAPTION not in template for template in templates)


def test_a_file_of_templates(tmp_path: Path) -> None:
    """METHODS 2.6: A1111's marks, one template a line."""
    path = tmp_path / "mine.txt"
    path.write_text("\ufeffa [name] here\n\n  [filewords], by [name]  \n", encoding="utf-8")
    assert read_templates(str(path)) == ("a [name] here", "[filewords], by [name]")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a [name]\na photo\n", r"mine\.txt:2: has no \[name\]"),
        (b"a [nane]\n", r"mine\.txt:1: \[nane\] means nothing; did you mean '\[name\]'"),
        (b"\n \n", "holds no template"),
        (b"a \xff [name]", "is not UTF-8: offset 2"),
    ],
)
def test_bad_files_of_templates(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_templates(str(path))


def test_a_misspelt_list_is_named() -> None:
    with pytest.raises(UserError, match="no file 'objekt'; did you mean 'object'"):
        read_templates("objekt")


def test_templates_are_filled_with_word_and_captions(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("the [name]\n[filewords] of [name] and [name]\n", encoding="utf-8")
    wording = Wording.of(config("<a>", "<b>", templates=str(path)))
    assert not wording.replaces
    assert wording.captions(("x [name]", "y"), "<b>") == (
        "the <b>",
        "x <b> of <b> and <b>",
        "y of <b> and <b>",
    )
    assert Wording.of(config()).captions(("x", "y"), None)[:2] == (
        "a plain view of a <zib>",
        "the <zib> seen from nearby",
    )
    with pytest.raises(UserError, match="which of <a>, <b> is meant"):
        wording.captions(("x",), None)


def test_templates_are_drawn_by_seed_sample_and_draw(folder: Folder, make_recipe: MakeRecipe, fake: Any) -> None:
    """METHODS 2.6, contract 1: a pure function of (seed, sample id, draw), whatever the batch size."""

    def drawn(count: int, batch: int, **keys: Any) -> dict[tuple[str, int], str]:
        recipe = make_recipe(pictures, adapter=words(), recipe="textual_inversion", train={"batch_size": batch}, **keys)
        batches = prepared(recipe, fake())
        found = [batches.batch(step) for step in range(count // batch)]
        return {
            key: text for b in found for key, text in zip(zip(b.ids, b.draws, strict=True), b.captions, strict=True)
        }

    pictures = folder(4, captions=False)
    one, two, other = drawn(64, 1), drawn(64, 4), drawn(64, 1, seed=1)
    assert one == two
    assert list(one.values()) != list(other.values())
    filled = {template.replace(NAME, "<zib>") for template in TEMPLATES["object"]}
    assert set(one.values()) <= filled
    assert len(set(one.values())) > len(filled) // 2


def test_captions_are_replaced_and_class_images_are_not(folder: Folder, make_recipe: MakeRecipe, fake: Any) -> None:
    """METHODS 2.6: without [filewords] captions have no part; class images keep their class prompt."""
    prior = {"kind": "images", "count": 2}
    recipe = make_recipe(folder(3), adapter=words(), prior=prior, train={"batch_size": 2})
    batches = prepared(recipe, fake())
    filled = [template.replace(NAME, "<zib>") for template in TEMPLATES["object"]]
    assert batches.final_captions == [*filled, "a star"]
    for step in range(4):
        batch = batches.batch(step)
        for text, prior_ in zip(batch.captions, batch.prior.tolist(), strict=True):
            assert (text == "a star") if prior_ else (text in filled)
    assert batches.prompts is None
    assert any("the prior changes nothing" in note for note in batches.notes)
    assert not any("lacks the trigger" in note for note in batches.notes)
    assert batches.example_prompts[0] == filled[0]


def test_file_words_are_the_picture_s_own(folder: Folder, make_recipe: MakeRecipe, fake: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("[filewords] with [name]\n", encoding="utf-8")
    recipe = make_recipe(folder(2), adapter=words(templates=str(path)), recipe="textual_inversion")
    batches = prepared(recipe, fake())
    assert batches.final_captions == [f"a photo of zib number {index} with <zib>" for index in range(2)]
    for number in range(8):
        batch = batches.batch(number)
        assert batch.captions[0] == f"a photo of zib number {batch.ids[0][2]} with <zib>"


def test_pictures_need_captions_only_where_templates_use_them(
    folder: Folder, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("[filewords] with [name]\n", encoding="utf-8")
    recipe = make_recipe(folder(2, captions=False))
    assert scan(recipe.data, words=config())[0].pictures[0].captions[0] == "a plain view of a <zib>"
    with pytest.raises(UserError, match="has no caption"):
        scan(recipe.data, words=config(templates=str(path)))


def test_dropped_captions_are_dropped_with_their_template(folder: Folder, make_recipe: MakeRecipe, fake: Any) -> None:
    recipe = make_recipe(folder(2), adapter=words(), recipe="textual_inversion", data={"caption_dropout": 0.5})
    batches = prepared(recipe, fake())
    texts = [batches.batch(step).captions[0] for step in range(60)]
    assert 15 < texts.count("") < 45
    assert all("<zib>" in text for text in texts if text)


def test_a_word_that_no_caption_holds_is_refused(folder: Folder, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(folder(2))
    with pytest.raises(UserError, match=r"'<zib>' stands in no caption.*a photo of zib number 0"):
        scan(recipe.data, words=config(templates=None))
    with pytest.raises(UserError, match="'<b>' stands in no caption"):
        scan(make_recipe(folder(1, "more"), concept={"trigger": "<a>"}).data, words=config("<a>", "<b>"))


def test_long_captions_are_counted_with_all_tokens_of_a_word(
    folder: Folder, make_recipe: MakeRecipe, fake: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """METHODS 2.1: nothing is cut silently. The note counts the tokens; a word that would be cut is an error."""
    pictures = folder(2, captions=False)
    for index, text in enumerate(["a <zib> of " + "red " * 8, "a <zib>"]):
        (pictures / f"{index}.txt").write_text(text, encoding="utf-8")

    def recipe(vectors: int) -> Recipe:
        tokens = [{"token": "<zib>", "vectors": vectors}]
        return make_recipe(pictures, adapter=words(tokens=tokens, templates=None), recipe="textual_inversion")

    with caplog.at_level(logging.WARNING, "finetune"):
        batches = prepared(recipe(4), fake())
    assert batches.describe()["captions_cut"] == 1
    assert any("loses 2 tokens" in note for note in batches.notes)
    assert "1 of 2 captions are too long" in caplog.text
    assert prepared(recipe(2), fake()).describe()["captions_cut"] == 0
    with pytest.raises(UserError, match=r"'<zib>' stands too far back in the caption .* lower vectors"):
        prepared(recipe(12), fake())
