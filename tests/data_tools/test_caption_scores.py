"""Right captions score above wrong ones, and the nearest of several is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_captioners import photographs
from typer.testing import CliRunner

from data_tools.captioning.captioner import Caption
from data_tools.captioning.ranking import Phrases, choose, read_phrases
from data_tools.captioning.scorer import load_scorer
from finetune.cli import app
from finetune.errors import UserError
from finetune.tinyworld.captions import compose
from finetune.tinyworld.world import FACTORS, Scene, render

Make = Callable[[str], Path]
COUNT = 24


def world(count: int = COUNT) -> tuple[list[Image.Image], list[str]]:
    """Pictures of the embedded world, and captions that name all that can be named."""
    scenes = [Scene.draw(seed=7, index=index) for index in range(count)]
    return [render(scene)[0] for scene in scenes], [compose(scene.factors) for scene in scenes]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_features_do_not_depend_on_the_batch(tiny_model: Make, kind: str) -> None:
    scorer = load_scorer(str(tiny_model(kind)))
    images, texts = photographs(3), ["a dog", "a photo of a red star on the beach", "a cat " * 40]
    for together, alone in (
        (scorer.images(images), torch.cat([scorer.images([image]) for image in images])),
        (scorer.texts(texts), torch.cat([scorer.texts([text]) for text in texts])),
    ):
        assert torch.allclose(together, alone, atol=1e-5)
        assert torch.allclose(together.norm(dim=1), torch.ones(3), atol=1e-5)
        assert (together[0] - together[1]).abs().max() > 1e-3


def test_other_models_compare_nothing(tiny_model: Make) -> None:
    with pytest.raises(UserError, match="is a 'blip', which does not compare words with pictures"):
        load_scorer(str(tiny_model("blip")))


@pytest.mark.base
def test_right_captions_score_above_wrong_ones() -> None:
    images, texts = world()
    scorer = load_scorer("tinyworld")
    near = scorer.images(images) @ scorer.texts(texts).T
    wrong = near.clone().fill_diagonal_(-1)
    assert (near.diag() > wrong.max(1).values).float().mean() > 0.9


@pytest.mark.base
def test_the_nearest_candidate_is_taken_and_empty_ones_never() -> None:
    images, texts = world()
    others = texts[1:] + texts[:1]
    choices = [[Caption(""), Caption(wrong), Caption(right)] for wrong, right in zip(others, texts, strict=True)]
    scorer = load_scorer("tinyworld")
    right = [chosen.text == text for chosen, text in zip(choose(scorer, images, choices), texts, strict=True)]
    assert sum(right) >= COUNT - 1
    assert choose(scorer, images[:1], [[Caption(""), Caption("")]]) == [Caption("")]


@pytest.mark.base
def test_phrases_are_found_in_pictures() -> None:
    scenes = [Scene.draw(seed=7, index=index) for index in range(COUNT)]
    phrases = [f"a {colour} {shape}" for colour in FACTORS["colour"] for shape in FACTORS["shape"]]
    found = Phrases(load_scorer("tinyworld"), phrases, 3).best([render(scene)[0] for scene in scenes])
    hits = [f"a {scene.colour} {scene.shape}" in best for scene, best in zip(scenes, found, strict=True)]
    assert all(len(best) == 3 for best in found) and sum(hits) > 0.8 * COUNT


def test_a_list_of_phrases(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# colours\nred  sky\n\nblue sky\nred sky\n", encoding="utf-8")
    assert read_phrases(path) == ["red sky", "blue sky"]
    path.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no phrases"):
        read_phrases(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_phrases(tmp_path / "none.txt")


@pytest.mark.base
def test_the_command_lists_the_worst_first(tmp_path: Path) -> None:
    """The third picture has the fourth's caption; one has none and one is broken."""
    images, texts = world(6)
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        image.save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(texts[3] if number == 2 else text, encoding="utf-8")
    (tmp_path / "5.txt").unlink()
    (tmp_path / "6.png").write_bytes(b"no picture")
    (tmp_path / "6.txt").write_text("a dog", encoding="utf-8")
    command = ["data", "score", str(tmp_path), "--model", "tinyworld", "--device", "cpu"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    lines = done.stdout.splitlines()
    assert f"2.png: {texts[3]}" in lines[0] and "6.png: is not a picture" in done.output
    assert lines[-1] == "5 captions scored, 1 pictures have none"
    between = (float(lines[0].split()[0]) + float(lines[1].split()[0])) / 2
    found = json.loads(CliRunner().invoke(app, [*command, "--json", "--below", str(between)]).stdout)
    assert [row["picture"] for row in found["scores"]] == ["2.png"] and found["without"] == 1
