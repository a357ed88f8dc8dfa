"""The DreamBooth protocol on the embedded world: the same questions before and after training, and what they show.

How pictures are drawn is left to the caller (``Draw``), so the protocol asks a base model, an adapter in memory and an
exported file that was loaded again in the same way, with the same seeds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from finetune import files
from finetune.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from finetune.tinyworld.subject import Subject

    Pictures = Sequence[Image.Image]

Draw = Callable[[Sequence[str], int], Sequence["Image.Image"]]
"""``draw(prompts, per_prompt)``: ``per_prompt`` pictures of each prompt, those of one prompt side by side. The noise of
a picture must depend on its place and on nothing else."""

FILE = "evaluation.json"  # in the folder of a run
CHECKED = ("shape", "background", "position")  # a subject's colours and fill are its own
OTHERS = 8  # individuals of the same class that make the floor
MINIMUM_SEPARATION = 0.2  # between floor and ceiling, below which a subject is not told from its class


class Judge(Protocol):
    """Who looks at pictures of the embedded world."""

    def embed(self, images: Pictures) -> Tensor:
        """Who is in each picture, float [N, D]."""
        ...

    def attribute_names(self, images: Pictures) -> list[dict[str, str]]:
        """The attributes seen in each picture."""
        ...


@dataclass(frozen=True)
class Questions:
    """What a model is asked before and after.

    Attributes:
        scenes: prompts for the subject in new scenes, and what a judge can check of each (nothing for a real subject).
        instance: the prompt that the subject was taught with.
        class_prompt: the same without the rare token; None where a recipe has none.
        per_scene, per_instance, per_class: pictures of each; ``plain`` prompts get as many as scenes do.
        plain: prompts that should draw what they did before: the scenes without the words of a style.
    """

    scenes: tuple[tuple[str, Mapping[str, str]], ...]
    instance: str
    class_prompt: str | None = None
    per_scene: int = 2
    per_instance: int = 8
    per_class: int = 16
    plain: tuple[str, ...] = ()

    @property
    def pictures(self) -> int:
        """How many pictures a model draws to answer."""
        of_class = self.per_class if self.class_prompt else 0
        return (len(self.scenes) + len(self.plain)) * self.per_scene + self.per_instance + of_class


@dataclass(frozen=True)
class Answers:
    """Pictures that a model drew for ``Questions``, a row per scene and per plain prompt."""

    scenes: tuple[tuple[Image.Image, ...], ...]
    instance: tuple[Image.Image, ...]
    of_class: tuple[Image.Image, ...] = ()
    plain: tuple[tuple[Image.Image, ...], ...] = ()


@dataclass(frozen=True)
class Figures:
    """The judge's figures for one model.

    Attributes:
        fidelity: DINO*, mean cosine of the pictures in new scenes and the subject's real pictures.
        normalised: the same between the floor (0) and the ceiling (1).
        instance_normalised: of the pictures of the plain instance prompt.
        accuracy: share of named attributes (shape, background, position) that are as the prompt says, in new scenes.
            NaN where the prompts name none; ``pres`` and ``div`` are where there is no class prompt.
        accuracies: the same per attribute.
        pres: PRES*, mean cosine of pictures of the bare class and the subject's real pictures; lower is better.
        div: DIV*, mean of 1 - cosine among the pictures of the bare class; higher is better.
        parts: of a style, what its fidelity is made of.

    Of a style, ``fidelity`` is its own (``finetune.evaluation.styles``), ``pres`` the trace of it in
    scenes without the style's words, and ``div`` is taken among the pictures of one such prompt.
    """

    fidelity: float
    normalised: float
    instance_normalised: float
    accuracy: float
    accuracies: dict[str, float]
    pres: float
    div: float
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """A subject's or style's figures before and after, and what bounds them.

    Attributes:
        subject: its number.
        floor: mean cosine of other individuals of the class and the subject.
        ceiling: mean cosine of real pictures of the subject that no training saw and those that it saw.
        oracle_accuracy: prompt accuracy of real renders, which is how well the judge reads.
        oracle_div: DIV* of real renders of the class, each another individual.
        kind: what was taught. A style's fidelity has its floor at 0 and its ceiling at 1.
    """

    subject: int
    floor: float
    ceiling: float
    oracle_accuracy: float
    oracle_div: float
    before: Figures
    after: Figures
    kind: Literal["subject", "style"] = "subject"

    def write(self, folder: Path) -> Path:
        """Write ``evaluation.json`` into the folder of a run."""
        files.write_json(folder / FILE, asdict(self))
        return folder / FILE

    @staticmethod
    def read(folder: Path) -> Evaluation:
        """The evaluation that ``write`` wrote."""
        return Evaluation.of(json.loads((folder / FILE).read_text(encoding="utf-8")))

    @staticmethod
    def of(values: Mapping[str, Any]) -> Evaluation:
        """From the mapping that ``dataclasses.asdict`` makes."""
        sides = {side: Figures(**values[side]) for side in ("before", "after")}
        return Evaluation(**{**values, **sides})


def tinyworld_questions(
    seed: int, *, token: str | None = None, scenes: int = 10, per_scene: int = 2, per_class: int = 16
) -> Questions:
    """The questions for the embedded world's subject ``seed``: new scenes are none of the instance pictures'.

    Args:
        token: stands for the subject in place of its own rare word.
    """
    from finetune import tinyworld

    one = tinyworld.subject(seed)
    one = one if token is None else replace(one, token=token)
    return Questions(
        scenes=tuple(tinyworld.scene_prompts(one, count=scenes)),
        instance=one.instance_prompt,
        class_prompt=one.class_prompt,
        per_scene=per_scene,
        per_class=per_class,
    )


def ask(questions: Questions, draw: Draw) -> Answers:
    """Draw the pictures of every question."""

    def rows(prompts: Sequence[str]) -> tuple[tuple[Image.Image, ...], ...]:
        step = questions.per_scene
        flat = list(draw(prompts, step)) if prompts else []
        return tuple(tuple(flat[start : start + step]) for start in range(0, len(flat), step))

    of_class = draw([questions.class_prompt], questions.per_class) if questions.class_prompt else ()
    return Answers(
        scenes=rows([prompt for prompt, _ in questions.scenes]),
        instance=tuple(draw([questions.instance], questions.per_instance)),
        of_class=tuple(of_class),
        plain=rows(questions.plain),
    )


def evaluate(
    seed: int, questions: Questions, before: Answers, after: Answers, judge: Judge | None = None
) -> Evaluation:
    """What the judge says of both answers about the embedded world's subject ``seed``.

    Raises:
        ValueError: the judge does not tell the subject from its class (floor and ceiling too close).
    """
    from finetune import tinyworld
    from finetune.evaluation.measures import mean, similarity
    from finetune.tinyworld.subject import HELDOUT, prompt_of

    judge = judge or shipped_judge()
    one = tinyworld.subject(seed)
    real = judge.embed(tinyworld.instance_pictures(one))
    heldout = [(one.render(scene)[0], prompt_of(one, scene)[1]) for scene in tinyworld.new_scenes(one, HELDOUT)]
    others = [picture for other in same_class(one) for picture in tinyworld.instance_pictures(other)[:2]]
    floor = similarity(judge.embed(others), real)
    ceiling = similarity(judge.embed([picture for picture, _ in heldout]), real)
    if ceiling - floor < MINIMUM_SEPARATION:
        raise ValueError(
            f"the judge does not tell subject {seed} from its class: floor {floor:.2f}, ceiling {ceiling:.2f}; "
            "take another subject"
        )
    return Evaluation(
        subject=seed,
        floor=floor,
        ceiling=ceiling,
        oracle_accuracy=mean(accuracies_of(judge, [[p] for p, _ in heldout], [named for _, named in heldout]).values()),
        oracle_div=_diversity(judge, [tinyworld.instance_pictures(other)[0] for other in same_class(one)]),
        before=_figures(judge, questions, before, real, floor, ceiling),
        after=_figures(judge, questions, after, real, floor, ceiling),
    )


def same_class(one: Subject, count: int = OTHERS) -> list[Subject]:
    """Other individuals of a subject's class, the same ones every time."""
    from finetune.tinyworld.subject import subject

    found: list[Subject] = []
    seed = 1_000_000 + one.seed
    while len(found) < count:
        other = subject(seed)
        if other.shape == one.shape:
            found.append(other)
        seed += 1
    return found


def shipped_judge() -> Judge:
    """The judge that comes with the embedded world."""
    from finetune import tinyworld

    return tinyworld.Judge.load()


def _figures(
    judge: Judge, questions: Questions, answers: Answers, real: Tensor, floor: float, ceiling: float
) -> Figures:
    from finetune.evaluation.measures import mean, normalised, similarity

    fidelity = similarity(judge.embed([picture for row in answers.scenes for picture in row]), real)
    instance = similarity(judge.embed(answers.instance), real)
    accuracies = accuracies_of(judge, answers.scenes, [named or _read(prompt) for prompt, named in questions.scenes])
    return Figures(
        fidelity=fidelity,
        normalised=normalised(fidelity, floor, ceiling),
        instance_normalised=normalised(instance, floor, ceiling),
        accuracy=mean(accuracies.values()),
        accuracies=accuracies,
        pres=similarity(judge.embed(answers.of_class), real) if answers.of_class else nan,
        div=_diversity(judge, answers.of_class) if len(answers.of_class) > 1 else nan,
    )


def accuracies_of(
    judge: Judge, rows: Sequence[Sequence[Image.Image]], named: Sequence[Mapping[str, str]]
) -> dict[str, float]:
    """Prompt accuracy of rows of pictures, per attribute, where ``named`` says what each row's prompt names."""
    from finetune.evaluation.measures import accuracy

    asked = [wanted for row, wanted in zip(rows, named, strict=True) for _ in row]
    return accuracy(asked, judge.attribute_names([picture for row in rows for picture in row]))


def _read(prompt: str) -> dict[str, str]:
    """What a user's own prompt names of the embedded world; nothing where it contradicts itself."""
    from finetune.tinyworld import parse

    try:
        return {name: value for name, value in parse(prompt).items() if name in CHECKED}
    except UserError:
        return {}


def _diversity(judge: Judge, pictures: Sequence[Image.Image]) -> float:
    from finetune.evaluation.measures import diversity

    return diversity(judge.embed(pictures))
