"""Generators whose worth is known get the figures that they deserve."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isnan
from pathlib import Path

import pytest
import torch
from PIL import Image

from finetune import tinyworld
from finetune.evaluation.protocol import (
    Answers,
    Evaluation,
    Questions,
    ask,
    evaluate,
    same_class,
    tinyworld_questions,
)
from finetune.tinyworld import Scene, rng
from finetune.tinyworld.subject import HELDOUT, Subject

SEED = 31
Paint = Callable[[dict[str, str], int], Image.Image]


class KnowingJudge:
    """Knows every picture that was made through it: who is in it, and where."""

    def __init__(self) -> None:
        self.seen: dict[bytes, tuple[str, dict[str, str]]] = {}

    def knows(self, picture: Image.Image, who: str, factors: dict[str, str]) -> Image.Image:
        self.seen[picture.tobytes()] = (who, factors)
        return picture

    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """A direction of its own for each individual, with a little of the picture in it."""
        rows = []
        for image in images:
            who, _ = self.seen[image.tobytes()]
            row = torch.from_numpy(rng("who", who).normal(size=64))
            row += 0.3 * torch.from_numpy(rng("picture", image.tobytes().hex()[:64]).normal(size=64))
            rows.append(row)
        return torch.stack(rows)

    def attribute_names(self, images: Sequence[Image.Image]) -> list[dict[str, str]]:
        return [self.seen[image.tobytes()][1] for image in images]


def remember_subjects(judge: KnowingJudge, one: Subject, others: Sequence[Subject]) -> None:
    """Tell the judge the pictures that the protocol itself renders."""
    for subject in (one, *others):
        for scene in [*tinyworld.instance_scenes(subject), *tinyworld.new_scenes(subject, HELDOUT)]:
            judge.knows(subject.render(scene)[0], f"subject {subject.seed}", scene.factors)


def answers(questions: Questions, in_scene: Paint, of_class: Paint, shape: str) -> Answers:
    """What a generator draws that paints ``in_scene`` for the subject and ``of_class`` for the bare class."""
    return Answers(
        scenes=tuple(
            tuple(in_scene(dict(named), 100 * number + copy) for copy in range(questions.per_scene))
            for number, (_, named) in enumerate(questions.scenes)
        ),
        instance=tuple(in_scene({"shape": shape}, 5000 + copy) for copy in range(questions.per_instance)),
        of_class=tuple(of_class({"shape": shape}, 7000 + copy) for copy in range(questions.per_class)),
    )


def subject_painter(judge: KnowingJudge, one: Subject) -> Paint:
    """The oracle: the subject, where the prompt says."""

    def paint(named: dict[str, str], number: int) -> Image.Image:
        scene = Scene.having(named, rng("oracle", number))
        return judge.knows(one.render(scene)[0], f"subject {one.seed}", scene.factors)

    return paint


def class_painter(judge: KnowingJudge) -> Paint:
    """The untouched model: anything of the class, where the prompt says."""

    def paint(named: dict[str, str], number: int) -> Image.Image:
        scene = Scene.having(named, rng("class", number))
        return judge.knows(tinyworld.render(scene)[0], f"{scene.colour} {scene.fill}", scene.factors)

    return paint


def photocopier(judge: KnowingJudge, one: Subject) -> Paint:
    """A generator that has learnt its training pictures by heart."""
    scenes = tinyworld.instance_scenes(one)

    def paint(named: dict[str, str], number: int) -> Image.Image:
        return one.render(scenes[number % len(scenes)])[0]

    return paint


@pytest.fixture(scope="module")
def judge() -> KnowingJudge:
    one = tinyworld.subject(SEED)
    judge = KnowingJudge()
    remember_subjects(judge, one, same_class(one))
    return judge


@pytest.fixture(scope="module")
def questions() -> Questions:
    return tinyworld_questions(SEED)


@pytest.fixture(scope="module")
def base(judge: KnowingJudge, questions: Questions) -> Answers:
    paint = class_painter(judge)
    return answers(questions, paint, paint, tinyworld.subject(SEED).shape)


@pytest.fixture(scope="module")
def oracle(judge: KnowingJudge, questions: Questions) -> Answers:
    one = tinyworld.subject(SEED)
    return answers(questions, subject_painter(judge, one), class_painter(judge), one.shape)


def test_the_oracle_reaches_the_ceiling_and_the_base_the_floor(
    judge: KnowingJudge, questions: Questions, base: Answers, oracle: Answers
) -> None:
    found = evaluate(SEED, questions, base, oracle, judge)
    assert found.after.normalised == pytest.approx(1.0, abs=0.1)
    assert found.before.normalised == pytest.approx(0.0, abs=0.2)
    assert found.after.accuracy == found.before.accuracy == found.oracle_accuracy == 1.0
    assert set(found.after.accuracies) == {"shape", "background", "position"}  # never a subject's own colours


def test_training_pictures_by_heart_look_like_the_subject_but_ignore_the_prompt(
    judge: KnowingJudge, questions: Questions, base: Answers
) -> None:
    one = tinyworld.subject(SEED)
    copies = answers(questions, photocopier(judge, one), class_painter(judge), one.shape)
    found = evaluate(SEED, questions, base, copies, judge)
    assert found.after.normalised > 0.9
    assert found.after.accuracies["background"] < 0.5
    assert found.after.accuracy < 0.8


def test_a_class_that_collapsed_into_the_subject_is_seen(
    judge: KnowingJudge, questions: Questions, base: Answers, oracle: Answers
) -> None:
    one = tinyworld.subject(SEED)
    paint = subject_painter(judge, one)
    collapsed = answers(questions, paint, paint, one.shape)
    kept, lost = (evaluate(SEED, questions, base, side, judge).after for side in (oracle, collapsed))
    assert lost.pres > kept.pres + 0.5
    assert lost.div < kept.div - 0.3


def test_a_constant_generator_has_no_variety(judge: KnowingJudge, questions: Questions, base: Answers) -> None:
    same = replace(base, of_class=(base.of_class[0],) * 16)
    assert evaluate(SEED, questions, base, same, judge).after.div == 0.0


def test_figures_do_not_depend_on_the_order_of_pictures(
    judge: KnowingJudge, questions: Questions, base: Answers
) -> None:
    turned = Answers(tuple(row[::-1] for row in base.scenes), base.instance[::-1], base.of_class[::-1])
    found = evaluate(SEED, questions, base, turned, judge)
    for measure in ("fidelity", "normalised", "instance_normalised", "accuracy", "pres", "div"):
        assert getattr(found.before, measure) == pytest.approx(getattr(found.after, measure), abs=1e-9)


def test_questions_show_no_scene_of_the_training_pictures(questions: Questions) -> None:
    seen = {(scene.background, scene.position) for scene in tinyworld.instance_scenes(tinyworld.subject(SEED))}
    asked = {(named["background"], named["position"]) for _, named in questions.scenes}
    assert len(asked) == 10 and not asked & seen
    assert questions.class_prompt is not None
    assert tinyworld.subject(SEED).token not in questions.class_prompt.split()


def test_the_floor_is_made_of_others_of_the_same_class() -> None:
    one = tinyworld.subject(SEED)
    others = same_class(one)
    assert {other.shape for other in others} == {one.shape}
    assert len({other.seed for other in others} - {SEED}) == len(others) == 8
    assert others == same_class(one)


def test_answers_stand_in_the_order_of_their_questions() -> None:
    def draw(prompts: object, per_prompt: int) -> list[Image.Image]:
        assert isinstance(prompts, list)
        return [
            Image.new("RGB", (8, 8), (hash_of(prompt), copy, 0)) for prompt in prompts for copy in range(per_prompt)
        ]

    questions = Questions((("a zib star on sand", {}), ("a zib star at night", {})), "a zib star", None, 3, 2)
    given = ask(questions, draw)
    assert [len(row) for row in given.scenes] == [3, 3]
    for (prompt, _), row in zip(questions.scenes, given.scenes, strict=True):
        assert [image.getpixel((0, 0)) for image in row] == [(hash_of(prompt), copy, 0) for copy in range(3)]
    assert len(given.instance) == 2 and given.of_class == ()


def test_an_evaluation_is_read_back_as_it_was(
    judge: KnowingJudge, questions: Questions, base: Answers, oracle: Answers, tmp_path: Path
) -> None:
    found = evaluate(SEED, questions, base, oracle, judge)
    found.write(tmp_path)
    assert Evaluation.read(tmp_path) == found


def test_prompts_of_a_user_are_judged_by_what_they_name(
    judge: KnowingJudge, questions: Questions, base: Answers, oracle: Answers
) -> None:
    own = replace(questions, scenes=tuple((prompt, {}) for prompt, _ in questions.scenes), class_prompt=None)
    found = evaluate(SEED, own, replace(base, of_class=()), replace(oracle, of_class=()), judge)
    assert found.after.accuracies == evaluate(SEED, questions, base, oracle, judge).after.accuracies
    assert isnan(found.after.pres) and isnan(found.after.div)


@pytest.mark.base
def test_the_shipped_judge_finds_the_oracle_as_good_as_real(questions: Questions) -> None:
    one, shipped = tinyworld.subject(SEED), tinyworld.Judge.load()
    knowing = KnowingJudge()
    plain = class_painter(knowing)
    before = answers(questions, plain, plain, one.shape)
    after = answers(questions, subject_painter(knowing, one), plain, one.shape)
    found = evaluate(SEED, questions, before, after, shipped)
    assert found.after.normalised > 0.85
    assert found.before.normalised < 0.35
    assert found.after.accuracy > 0.95


def hash_of(prompt: str) -> int:
    return sum(prompt.encode()) % 256
