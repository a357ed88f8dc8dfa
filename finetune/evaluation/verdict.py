"""A run in one sentence, from the judge's figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.evaluation.measures import normalised
from finetune.evaluation.protocol import Evaluation

GAIN = 0.4  # of normalised fidelity, from which a subject counts as learnt
LISTENS = 0.10  # of prompt accuracy, which a run may cost
DRIFT = 0.2  # of the class's similarity to the subject (PRES*), which a run may add

Grade = Literal["good", "mixed", "bad"]


@dataclass(frozen=True)
class Verdict:
    """Words and their colour."""

    text: str
    grade: Grade


def verdict(evaluation: Evaluation, subject: str, class_name: str) -> Verdict:
    """What the figures mean for a person.

    Args:
        subject: what the subject is called, "zib star". class_name: what its class is called, "star".
    """
    before, after = evaluation.before, evaluation.after
    gain = after.normalised - before.normalised
    learnt = gain >= GAIN
    listens = not before.accuracy - after.accuracy > LISTENS  # NaN, where prompts name nothing, is no complaint
    kept = not after.pres - before.pres > DRIFT
    if evaluation.kind == "style":
        return Verdict(_of_style(subject, gain, listens, kept), _grade(gain, listens and kept))
    others = plural(class_name)
    if gain < GAIN / 3:
        text = f"The model has not learnt the {subject}: its pictures are hardly closer to it than before."
    else:
        text = f"The model has learnt {'' if learnt else 'a part of '}the {subject}"
        match listens, kept:
            case True, True:
                text += f", puts it where the prompt says and still draws other {others}."
            case True, False:
                text += f" and puts it where the prompt says, but its other {others} now look like it too."
            case False, True:
                text += f" and still draws other {others}, but it follows the rest of a prompt less well."
            case _:
                text += f", but it follows the rest of a prompt less well and its other {others} now look like it."
    return Verdict(text, _grade(gain, listens and kept))


def _of_style(subject: str, gain: float, listens: bool, kept: bool) -> str:
    if gain < GAIN / 3:
        return f"The model has not learnt the {subject}: its pictures are hardly closer to it than before."
    text = f"The model has learnt {'' if gain >= GAIN else 'a part of '}the {subject}"
    match listens, kept:
        case True, True:
            return f"{text}, still draws what the prompt says, and leaves other pictures plain."
        case True, False:
            return f"{text} and still draws what the prompt says, but other pictures are now in it too."
        case False, True:
            return f"{text} and leaves other pictures plain, but it follows the rest of a prompt less well."
        case _:
            return f"{text}, but it follows the rest of a prompt less well, and other pictures are now in it too."


def _grade(gain: float, well: bool) -> Grade:
    if gain < GAIN / 3:
        return "bad"
    return "good" if gain >= GAIN and well else "mixed"


def closeness(evaluation: Evaluation, value: float) -> float:
    """A cosine with the subject's pictures as 0 (another individual of the class) to 1 (the subject itself)."""
    return normalised(value, evaluation.floor, evaluation.ceiling)


def plural(noun: str) -> str:
    """Of a class word: "stars", "crosses"."""
    return noun + ("es" if noun.endswith(("s", "x", "z", "ch", "sh")) else "s")
