"""What a study of methods found: a row for each, the orderings that had to hold, and a section of a page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import TYPE_CHECKING, Literal

from finetune.evaluation.findings import Claim
from finetune.evaluation.measures import bootstrap
from finetune.evaluation.protocol import Evaluation
from finetune.evaluation.trials import Outcome

if TYPE_CHECKING:
    from finetune.evaluation.methods import Result

BEGIN = "<!-- methods: written by python -m finetune.evaluation.methods -->"
END = "<!-- end of methods -->"
HEADING = "## Measured"
NONE = "–"
PARTS = ("colours", "lines")  # of style fidelity
NOUNS = ("right-noun", "wrong-noun", "no-noun")  # which are asked in other words
OTHER_MODEL = ("flow",)  # whose untouched answers are a row of their own

Kind = Literal["subject", "style"]
COLUMNS: tuple[tuple[str, Kind | None, str], ...] = (
    ("subject fidelity", "subject", "normalised"),
    ("style fidelity", "style", "normalised"),
    ("its colours", "style", "colours"),
    ("its lines", "style", "lines"),
    ("prompt accuracy, subjects", "subject", "accuracy"),
    ("prompt accuracy, styles", "style", "accuracy"),
    ("PRES*, subjects", "subject", "pres"),
    ("PRES*, styles", "style", "pres"),
    ("DIV*", None, "div"),
)


@dataclass(frozen=True)
class Ordering:
    """One method is better than another: of ``measure``, on the same subjects or styles."""

    text: str
    better: str
    worse: str  # "base" for the untouched model


ORDERINGS = (  # METHODS.md, section 10.2
    Ordering("DreamBooth is closer to the subject than textual inversion", "lora", "ti-1"),
    Ordering("textual inversion of one vector is closer to the subject than the base", "ti-1", "base"),
    Ordering("textual inversion of four vectors is closer to the subject than the base", "ti-4", "base"),
    Ordering("four vectors are closer to the subject than one", "ti-4", "ti-1"),
    Ordering("the right class noun is closer to the subject than a wrong one", "right-noun", "wrong-noun"),
    Ordering("a wrong class noun is closer to the subject than none", "wrong-noun", "no-noun"),
)


def claims(results: Sequence[Result]) -> list[Claim]:
    """The orderings, of means of differences over the subjects that have both runs; none where there is no such."""
    found = []
    for one in ORDERINGS:
        pairs = _pairs(results, one)
        if pairs:
            gap = bootstrap([better - worse for better, worse in pairs])
            found.append(Claim(one.text, gap, "> 0", gap.mean > 0))
    return found


def _pairs(results: Sequence[Result], ordering: Ordering) -> list[tuple[float, float]]:
    by_method = {name: _of(results, name, "subject") for name in (ordering.better, ordering.worse)}
    better = by_method[ordering.better]
    if ordering.worse == "base":
        return [(one.after.normalised, one.before.normalised) for one in better.values()]
    worse = by_method[ordering.worse]
    return [(better[seed].after.normalised, worse[seed].after.normalised) for seed in better if seed in worse]


def section(
    results: Sequence[Result],
    titles: Mapping[str, str],
    held: Sequence[Claim],
    where: Mapping[str, Mapping[str, str]],
) -> str:
    """The section as Markdown."""
    methods = list(dict.fromkeys(one.trial.method for one in results))
    seeds = {kind: sorted({r.trial.taught.seed for r in results if r.trial.taught.kind == kind}) for kind in ENDS}
    said = " and ".join(f"{kind}s {', '.join(map(str, found))}" for kind, found in seeds.items() if found)
    names = [name for name, *_ in COLUMNS]
    failed = [one for one in results if one.failure]
    lines = [
        f"Unseen {said} of the embedded world; means with a 95 % bootstrap interval over them. Fidelity runs from 0 to",
        "1: " + "; ".join(f"of a {kind}, {ends}" for kind, ends in ENDS.items()) + ". PRES* is what leaks",
        "into prompts that do not ask for it, and lower is better; all other measures are better where they are higher",
        "([what they mean](evaluation.md)). Time (median) and memory (largest) are of a whole run with its evaluation",
        "and report; files are those of one layout.",
        "",
        f"| method | {' | '.join(names)} | files | trained | time | peak memory |",
        f"|---|{'---|' * (len(names) + 4)}",
        *_bases(results, methods),
        *(_row(results, name, titles[name]) for name in methods),
        "",
        *(_claims(held) if held else []),
        *(
            [*(f"- **failed**: {one.trial.name}: {one.failure.splitlines()[0]}" for one in failed), ""]
            if failed
            else []
        ),
        f"{where['machine']['processor']}, {where['machine']['memory']}; "
        + ", ".join(f"{name} {version}" for name, version in where["versions"].items())
        + ".",
        "",
        f"    {where['study']['command']}",
    ]
    return "\n".join(lines)


ENDS: dict[Kind, str] = {
    "subject": "others of its class and held-out pictures of it",
    "style": "plain renders and held-out renders in it",
}


def _claims(held: Sequence[Claim]) -> list[str]:
    rows = [f"| {one.text}, by | {one.found} | {one.asked} | {'yes' if one.holds else '**no**'} |" for one in held]
    return ["| what must hold | found | asked | |", "|---|---|---|---|", *rows, ""]


def _bases(results: Sequence[Result], methods: Sequence[str]) -> list[str]:
    """The untouched models: what they answered before any training, once for each subject and style."""
    own = [name for name in methods if name not in (*NOUNS, *OTHER_MODEL)]
    other = [name for name in methods if name in OTHER_MODEL]
    rows = (("untouched", own), ("untouched, flow matching", other))
    return [_base(results, title, some) for title, some in rows if some or title == "untouched"]


def _base(results: Sequence[Result], title: str, methods: Sequence[str]) -> str:
    first: dict[tuple[str, int], Evaluation] = {}
    for one in results:
        taught = one.trial.taught
        if one.outcome and one.trial.method in methods:
            first.setdefault((taught.kind, taught.seed), one.outcome.evaluation)
    cells = [_cell(list(first.values()), kind, measure, "before") for _, kind, measure in COLUMNS]
    return f"| {title} | {' | '.join(cells)} | {NONE} | {NONE} | {NONE} | {NONE} |"


def _row(results: Sequence[Result], method: str, title: str) -> str:
    some = [one for one in results if one.trial.method == method and one.outcome]
    outcomes: list[Outcome] = [one.outcome for one in some if one.outcome]
    cells = [_cell([one.evaluation for one in outcomes], kind, measure, "after") for _, kind, measure in COLUMNS]
    cost = [NONE] * 4
    if some:
        cost = [
            _bytes(max(one.size for one in some)),
            f"{max(one.trained for one in some):,}",
            f"{statistics.median(one.seconds for one in outcomes):.0f} s",
            _bytes(max(one.peak_memory for one in outcomes)),
        ]
    return f"| {' | '.join([title, *cells, *cost])} |"


def _cell(found: Sequence[Evaluation], kind: Kind | None, measure: str, side: Literal["before", "after"]) -> str:
    figures = [getattr(one, side) for one in found if kind in (None, one.kind)]
    values = [float(one.parts.get(measure, nan) if measure in PARTS else getattr(one, measure)) for one in figures]
    known = [value for value in values if not isnan(value)]
    return str(bootstrap(known)) if known else NONE


def _of(results: Sequence[Result], method: str, kind: Kind) -> dict[int, Evaluation]:
    """The evaluations of a method, by seed."""
    return {
        one.trial.taught.seed: one.outcome.evaluation
        for one in results
        if one.outcome and one.trial.method == method and one.trial.taught.kind == kind
    }


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
