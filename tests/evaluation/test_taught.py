"""A style run is asked of its own style, with and without it, and gets figures and a verdict as a subject's does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from finetune import tinyworld
from finetune.config.schema import ConceptConfig
from finetune.evaluation import Answers, Evaluation, Questions, ReportData, Taught, ask, shots, write_report
from finetune.evaluation.verdict import verdict
from finetune.tinyworld import Scene, parse, render, rng, style, training_scenes

SEED = 202


class Reader:
    """Reads the world's pictures by their names alone; embeds by colour."""

    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.tensor([[*image.resize((1, 1)).getpixel((0, 0)), 1.0] for image in images])

    def attribute_names(self, images: Sequence[Image.Image]) -> list[dict[str, str]]:
        return [{"shape": "star", "colour": "red", "background": "on grass"} for _ in images]


def painted(styled: bool, leaks: bool = False) -> Answers:
    """What a generator draws that knows the style, or one that draws everything in it."""
    questions = Taught("style", SEED).questions()

    def draw(prompts: Sequence[str], count: int) -> list[Image.Image]:
        found = []
        for number, prompt in enumerate(prompts):
            for copy in range(count):
                picture = render(Scene.having(parse(prompt), rng("painted", number, copy)))[0]
                inside = leaks or (styled and "style" in prompt)
                found.append(style(SEED).apply(picture) if inside else picture)
        return found

    return ask(questions, draw)


@pytest.fixture(scope="module")
def questions() -> Questions:
    return Taught("style", SEED).questions()


def test_concepts_of_the_embedded_world_are_recognised() -> None:
    assert Taught.of(ConceptConfig(folder="tinyworld:style/7")) == Taught("style", 7)
    assert Taught.of(ConceptConfig(folder="tinyworld:subject/12")) == Taught("subject", 12)
    assert Taught.of(ConceptConfig(folder="photos/subject/12")) is None


def test_a_style_is_asked_of_unseen_scenes_with_and_without_its_words(questions: Questions) -> None:
    one = style(SEED)
    assert len(questions.scenes) == len(questions.plain) == 10 and questions.pictures == 2 * 20 + 8
    taught = {one.prompt(scene) for scene in training_scenes(SEED)}
    assert questions.instance in taught
    for (prompt, named), plain in zip(questions.scenes, questions.plain, strict=True):
        assert prompt == f"{plain} in the style of {one.token}" and prompt not in taught
        assert parse(plain) == named
    assert len(set(questions.plain)) == 10


def test_questions_use_the_concept_s_own_words() -> None:
    concept = ConceptConfig(folder="tinyworld:style/202", trigger="<fep>")
    assert all(
        prompt.endswith("in the style of <fep>") for prompt, _ in Taught("style", SEED).questions(concept).scenes
    )
    one = tinyworld.subject(31)
    usual = Taught("subject", 31).questions()
    token = Taught("subject", 31).questions(ConceptConfig(folder="x", trigger="<zib>"))
    assert token.instance == f"a <zib> {one.shape}" and all("<zib>" in prompt for prompt, _ in token.scenes)
    bare = Taught("subject", 31).questions(
        ConceptConfig(folder="x", trigger="<zib>", prompt="a <zib>", class_prompt="a shape")
    )
    assert (bare.instance, bare.class_prompt) == ("a <zib>", "a shape")
    for (prompt, named), (other, same) in zip(bare.scenes, usual.scenes, strict=True):
        assert prompt == other.replace(usual.instance, "a <zib>") and named == same


def test_figures_tell_one_who_learnt_the_style_from_one_who_did_not(questions: Questions) -> None:
    before, learnt, leaking = painted(False), painted(True), painted(True, leaks=True)
    found = Taught("style", SEED).evaluate(questions, before, learnt, Reader())
    assert found.kind == "style" and (found.floor, found.ceiling) == (0, 1)
    assert found.before.normalised == pytest.approx(0, abs=0.05)
    assert found.after.normalised == pytest.approx(1, abs=0.1)
    assert found.after.instance_normalised == pytest.approx(1, abs=0.2)
    assert found.after.parts.keys() == {"colours", "lines"}
    assert found.after.pres == found.before.pres < 0.2  # the scenes' own colours move the floor a little
    assert 0 < found.after.accuracy < 1 and found.after.accuracies.keys() == {"shape", "colour", "background"}
    leaked = Taught("style", SEED).evaluate(questions, before, leaking, Reader())
    assert leaked.after.pres == pytest.approx(1, abs=0.1)
    assert "leaves other pictures plain" in verdict(found, "style vash", "").text
    assert verdict(found, "style vash", "").grade == "good"
    assert "other pictures are now in it too" in verdict(leaked, "style vash", "").text
    assert verdict(leaked, "style vash", "").grade == "mixed"
    nothing = Taught("style", SEED).evaluate(questions, before, before, Reader())
    assert verdict(nothing, "style vash", "").grade == "bad"


def test_a_style_s_evaluation_is_written_read_and_shown(questions: Questions, tmp_path: Path) -> None:
    before, after = painted(False), painted(True)
    found = Taught("style", SEED).evaluate(questions, before, after, Reader())
    found.write(tmp_path)
    assert Evaluation.read(tmp_path) == found
    data = ReportData(title="style vash", triggers=["vash"], evaluation=found, **shots(questions, before, after))
    page = write_report(tmp_path, data).read_text(encoding="utf-8")
    for words in (
        "Style fidelity",
        "style fidelity",
        "Other pictures stay plain",
        "The model has learnt the style vash",
    ):
        assert words in page
    assert "Subject fidelity" not in page and "of its class" not in page
    assert f"{questions.plain[0]} (before)" in page


@pytest.mark.base
def test_the_shipped_judge_reads_real_renders_in_the_style(questions: Questions) -> None:
    found = Taught("style", SEED).evaluate(questions, painted(False), painted(True))
    assert found.oracle_accuracy > 0.85
    assert found.before.accuracy > 0.95 and found.after.accuracy > 0.85
