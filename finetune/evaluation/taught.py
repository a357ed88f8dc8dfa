"""What runs of the embedded world teach, a subject or a style: the questions to ask of it, and who judges answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import TYPE_CHECKING, Literal

from finetune.config.schema import ConceptConfig
from finetune.errors import UserError
from finetune.evaluation import protocol
from finetune.evaluation.protocol import Answers, Evaluation, Figures, Judge, Questions

if TYPE_CHECKING:
    from PIL import Image

    from finetune.evaluation.styles import Scale
    from finetune.tinyworld import Scene, Style

    Rows = Sequence[Sequence[Image.Image]]

NAMED = ("shape", "colour", "background")  # what a style's prompts name
HELDOUT = 10


@dataclass(frozen=True)
class Taught:
    """A subject or a style of the embedded world, by its number."""

    kind: Literal["subject", "style"]
    seed: int

    @staticmethod
    def of(concept: ConceptConfig) -> Taught | None:
        """What a recipe's concept teaches; None unless it is the embedded world's."""
        found = re.fullmatch(r"tinyworld:(subject|style)/(\d+)", concept.folder or "")
        return Taught("subject" if found[1] == "subject" else "style", int(found[2])) if found else None

    def questions(self, concept: ConceptConfig | None = None, scenes: int = 10) -> Questions:
        """What to ask before and after, in the words of a recipe's concept: its trigger, prompt and class prompt."""
        token = concept.trigger if concept else None
        if self.kind == "style":
            return style_questions(self.seed, token=token, scenes=scenes)
        asked = protocol.tinyworld_questions(self.seed, token=token, scenes=scenes)
        return _reworded(asked, concept) if concept else asked

    def evaluate(self, questions: Questions, before: Answers, after: Answers, judge: Judge | None = None) -> Evaluation:
        """The figures; errors as of ``protocol.evaluate``."""
        judged = protocol.evaluate if self.kind == "subject" else evaluate_style
        return judged(self.seed, questions, before, after, judge)


def _reworded(asked: Questions, concept: ConceptConfig) -> Questions:
    """With the concept's own prompt in place of the subject's: "a zib on grass at the left"."""
    said = concept.prompt or asked.instance
    scenes = tuple((prompt.replace(asked.instance, said, 1), named) for prompt, named in asked.scenes)
    return replace(asked, scenes=scenes, instance=said, class_prompt=concept.class_prompt or asked.class_prompt)


def style_questions(seed: int, *, token: str | None = None, scenes: int = 10, per_scene: int = 2) -> Questions:
    """The questions for the embedded world's style ``seed``: scenes that its pictures don't show, with and without it.

    Args:
        token: stands for the style in place of its own rare word.
    """
    from finetune import tinyworld

    one = tinyworld.style(seed)
    one = one if token is None else replace(one, token=token)
    asked = _scenes(one, scenes)
    return Questions(
        scenes=tuple((one.prompt(scene), _named(scene)) for scene in asked),
        instance=one.prompt(tinyworld.training_scenes(seed)[0]),
        per_scene=per_scene,
        plain=tuple(tinyworld.compose(_named(scene)) for scene in asked),
    )


def evaluate_style(
    seed: int, questions: Questions, before: Answers, after: Answers, judge: Judge | None = None
) -> Evaluation:
    """What is to be said of both answers about the embedded world's style ``seed``.

    Fidelity needs no judge. Prompts are read by the judge of the plain world, which is blind to what a style does to
    colours, from pictures with the style undone where it is there.
    """
    from finetune import tinyworld
    from finetune.evaluation.measures import mean
    from finetune.evaluation.styles import Scale, readable

    judge = judge or protocol.shipped_judge()
    one = tinyworld.style(seed)
    scale = Scale.of(one)
    heldout = _scenes(one, HELDOUT, "held out")
    plain = [[tinyworld.render(_again(one, scene, copy))[0] for copy in range(2)] for scene in heldout]
    styled = [readable(one, [one.apply(picture) for picture in row]) for row in plain]
    return Evaluation(
        subject=seed,
        floor=0.0,
        ceiling=1.0,
        oracle_accuracy=mean(protocol.accuracies_of(judge, styled, list(map(_named, heldout))).values()),
        oracle_div=_variety(judge, plain),
        before=_figures(scale, judge, questions, before),
        after=_figures(scale, judge, questions, after),
        kind="style",
    )


def _figures(scale: Scale, judge: Judge, questions: Questions, answers: Answers) -> Figures:
    from finetune.evaluation.measures import mean
    from finetune.evaluation.styles import readable

    parts = scale.parts([picture for row in answers.scenes for picture in row])
    read = [readable(scale.style, row) for row in answers.scenes]
    accuracies = protocol.accuracies_of(judge, read, [named or _read(prompt) for prompt, named in questions.scenes])
    plain = [picture for row in answers.plain for picture in row]
    fidelity = parts["colours"] * parts["lines"]
    return Figures(
        fidelity=fidelity,
        normalised=fidelity,
        instance_normalised=scale.fidelity(answers.instance),
        accuracy=mean(accuracies.values()),
        accuracies=accuracies,
        pres=scale.trace(plain) if plain else nan,
        div=_variety(judge, answers.plain),
        parts=parts,
    )


def _read(prompt: str) -> Mapping[str, str]:
    """What a user's own prompt names; nothing where it contradicts itself."""
    from finetune.tinyworld import parse

    try:
        return {name: value for name, value in parse(prompt).items() if name in NAMED}
    except UserError:
        return {}


def _variety(judge: Judge, rows: Rows) -> float:
    """Mean over prompts of how much the pictures of one differ."""
    from finetune.evaluation.measures import diversity, mean

    return mean(diversity(judge.embed(row)) for row in rows if len(row) > 1)


def _scenes(one: Style, count: int, purpose: str = "questions") -> list[Scene]:
    """Scenes whose shape, colour and background together are none of the style's training pictures'."""
    from finetune import tinyworld

    used = [_named(scene) for scene in tinyworld.training_scenes(one.seed)]
    found: list[Scene] = []
    at = 0
    while len(found) < count:
        scene = tinyworld.Scene.having({}, tinyworld.rng("style", purpose, one.seed, at))
        at += 1
        if _named(scene) not in used:
            used.append(_named(scene))
            found.append(scene)
    return found


def _again(one: Style, scene: Scene, copy: int) -> Scene:
    """What the scene's prompt names, and all else drawn anew."""
    from finetune import tinyworld

    return tinyworld.Scene.having(dict(_named(scene)), tinyworld.rng("again", one.seed, str(_named(scene)), copy))


def _named(scene: Scene) -> Mapping[str, str]:
    return {name: scene.factors[name] for name in NAMED}
