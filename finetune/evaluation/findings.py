"""What a study found: means over subjects with their intervals, what had to hold, and a section of a page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import files
from finetune.evaluation.measures import Interval, bootstrap

if TYPE_CHECKING:
    from finetune.evaluation.study import Result

BEGIN = "<!-- fidelity: written by python -m finetune.evaluation.study -->"
END = "<!-- end of fidelity -->"
HEADING = "## Fidelity of the methods"
NAMES = {
    "lora": "LoRA",
    "full": "full fine-tuning",
    "images": "class images",
    "model": "the model itself",
    "none": "none",
}
FIDELITY, ACCURACY, PRES = 0.4, 0.10, 0.2


@dataclass(frozen=True)
class Row:
    """A method and a prior over all subjects. Pairs are before and after."""

    method: str
    prior: str
    subjects: int
    fidelity: tuple[Interval, Interval]
    accuracy: tuple[Interval, Interval]
    pres: tuple[Interval, Interval]
    div: tuple[Interval, Interval]
    seconds: float
    peak_memory: int


@dataclass(frozen=True)
class Claim:
    """Something that had to hold of the mean over subjects, and what was found."""

    text: str
    found: Interval
    asked: str
    holds: bool

    def __str__(self) -> str:
        return f"{'pass' if self.holds else 'FAIL'}  {self.text}: {self.found} (asked: {self.asked})"


def summarise(results: Sequence[Result]) -> list[Row]:
    """One row per method and prior, in the order of the results."""
    rows = []
    for method, prior in dict.fromkeys((one.trial.method, one.trial.prior) for one in results):
        some = _of(results, method, prior)

        def pair(measure: str, some: list[Result] = some) -> tuple[Interval, Interval]:
            before = bootstrap([getattr(one.evaluation.before, measure) for one in some])
            return before, bootstrap([getattr(one.evaluation.after, measure) for one in some])

        rows.append(
            Row(
                method,
                prior,
                len(some),
                fidelity=pair("normalised"),
                accuracy=pair("accuracy"),
                pres=pair("pres"),
                div=pair("div"),
                seconds=statistics.median(one.seconds for one in some),
                peak_memory=max(one.peak_memory for one in some),
            )
        )
    return rows


def claims(results: Sequence[Result]) -> list[Claim]:
    """What each method must show, with its prior: it learns the subject, keeps listening and spares the class."""
    found = []
    for method in dict.fromkeys(one.trial.method for one in results):
        kinds = list(dict.fromkeys(one.trial.prior for one in results if one.trial.method == method))
        for prior in [kind for kind in kinds if kind != "none"] or kinds:
            some, name = _of(results, method, prior), f"{NAMES[method]}, prior {NAMES[prior]}"
            gain = _change(some, "normalised")
            found.append(Claim(f"{name}: subject fidelity rises", gain, f">= {FIDELITY}", gain.mean >= FIDELITY))
            change = _change(some, "accuracy")
            found.append(
                Claim(f"{name}: prompt accuracy changes", change, f">= -{ACCURACY:.2f}", change.mean >= -ACCURACY)
            )
            without = {one.trial.subject: one.evaluation.after.pres for one in _of(results, method, "none")}
            saved = [
                without[one.trial.subject] - one.evaluation.after.pres for one in some if one.trial.subject in without
            ]
            if prior != "none" and saved:
                lower = bootstrap(saved)
                text = f"{name}: PRES* is lower than without a prior by"
                found.append(Claim(text, lower, f">= {PRES}", lower.mean >= PRES))
    return found


def section(
    results: Sequence[Result],
    rows: Sequence[Row],
    held: Sequence[Claim],
    where: Mapping[str, Mapping[str, str]],
) -> str:
    """The section as Markdown."""
    subjects = list(dict.fromkeys(one.trial.subject for one in results))
    listed = ", ".join(map(str, subjects))
    machine, libraries = where["machine"], where["versions"]
    lines = [
        f"Subjects {listed}, five pictures each. Means over subjects, before → after with a 95 % bootstrap interval.",
        "Subject fidelity lies between other individuals of the class (0) and held-out pictures of the subject (1).",
        "Lower PRES* and higher DIV* mean that the bare class stayed itself. Time (median) and memory (largest) are of",
        "a whole run: class images where none were there yet, caching, training, export, evaluation and report.",
        "",
        "| method | prior | subject fidelity | prompt accuracy | PRES* | DIV* | time | peak memory |",
        "|---|---|---|---|---|---|---|---|",
        *map(_line, rows),
        "",
        "| what must hold | found | asked | |",
        "|---|---|---|---|",
        *(f"| {one.text} | {one.found} | {one.asked} | {'yes' if one.holds else '**no**'} |" for one in held),
        "",
        "Subject fidelity after training, subject by subject:",
        "",
        f"| method | prior | {' | '.join(map(str, subjects))} |",
        f"|---|---|{'---|' * len(subjects)}",
        *(_each(results, row, subjects) for row in rows),
        "",
        f"{machine['processor']}, {machine['memory']}; "
        + ", ".join(f"{name} {version}" for name, version in libraries.items())
        + ".",
        "",
        f"    {where['study']['command']}",
    ]
    return "\n".join(lines)


def write_section(page: Path, text: str, begin: str = BEGIN, end: str = END, heading: str = HEADING) -> None:
    """Put ``text`` between the page's marks; a page without them gets the section at its end."""
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    block = f"{begin}\n\n{text}\n\n{end}"
    if begin in old and end in old:
        head, rest = old.split(begin, 1)
        new = head + block + rest.split(end, 1)[1]
    else:
        new = f"{old.rstrip()}\n\n{heading}\n\n{block}\n".lstrip()
    files.write_text(page, new)


def _of(results: Sequence[Result], method: str, prior: str) -> list[Result]:
    return [one for one in results if (one.trial.method, one.trial.prior) == (method, prior)]


def _change(results: Sequence[Result], measure: str) -> Interval:
    pairs = [(one.evaluation.before, one.evaluation.after) for one in results]
    return bootstrap([getattr(after, measure) - getattr(before, measure) for before, after in pairs])


def _line(row: Row) -> str:
    pairs = (row.fidelity, row.accuracy, row.pres, row.div)
    cells = [f"{before.mean:.2f} → {after}" for before, after in pairs]
    cost = [f"{row.seconds:.0f} s", f"{row.peak_memory / 1e9:.2f} GB"]
    return f"| {' | '.join([NAMES[row.method], NAMES[row.prior], *cells, *cost])} |"


def _each(results: Sequence[Result], row: Row, subjects: Sequence[int]) -> str:
    by_subject = {
        one.trial.subject: f"{one.evaluation.after.normalised:.2f}" for one in _of(results, row.method, row.prior)
    }
    cells = [by_subject.get(subject, "") for subject in subjects]
    return f"| {' | '.join([NAMES[row.method], NAMES[row.prior], *cells])} |"
