"""The report's section with the judge's figures: each measure on its scale, from its floor to its ceiling."""

from __future__ import annotations

from math import isnan

from finetune.evaluation.charts import gauge
from finetune.evaluation.markup import Markup, join, tag
from finetune.evaluation.protocol import Evaluation
from finetune.evaluation.report import ReportData
from finetune.evaluation.verdict import closeness

LEAD = (
    "A small network that knows every factor of the embedded world, and that took no part in training, looks at all of "
    "these pictures."
)


def judge(data: ReportData) -> Markup | None:
    """Four measures, or why there are none."""
    one = data.evaluation
    if one is None:
        return tag("p", data.no_evaluation, class_="lead") if data.no_evaluation and data.scenes else None
    cards = [_fidelity(one)]
    cards += [] if isnan(one.after.accuracy) else [_accuracy(one)]
    cards += [] if isnan(one.after.pres) else [_class(one), _variety(one)]
    return join([tag("p", LEAD, class_="lead"), tag("div", *cards, class_="measures")])


def percent(share: float) -> str:
    """0.83 as "83 %"."""
    return f"{100 * share:.0f} %"


def _fidelity(one: Evaluation) -> Markup:
    before, after = one.before, one.after
    return _measure(
        "Subject fidelity",
        "higher is better",
        _between(one, before.normalised, after.normalised),
        "How alike the subject in new scenes and its real pictures are, between other individuals of its class (0) and "
        f"real pictures that no training saw (1). As cosines: DINO* {before.fidelity:.2f} → {after.fidelity:.2f}, "
        f"floor {one.floor:.2f}, ceiling {one.ceiling:.2f}.",
    )


def _accuracy(one: Evaluation) -> Markup:
    sides = (("before", one.before.accuracy), ("after", one.after.accuracy))
    parts = ", ".join(
        f"{name} {percent(one.before.accuracies[name])} → {percent(value)}"
        for name, value in one.after.accuracies.items()
    )
    return _measure(
        "Prompt accuracy",
        "higher is better",
        gauge(
            [(name, value, percent(value)) for name, value in sides],
            [("nothing", 0.0), ("real renders", one.oracle_accuracy)],
            0.0,
            1.02,
        ),
        f"How much of what the prompts for new scenes name is really there: {parts}.",
    )


def _class(one: Evaluation) -> Markup:
    before, after = one.before.pres, one.after.pres
    return _measure(
        "The class stays itself",
        "lower is better",
        _between(one, closeness(one, before), closeness(one, after)),
        "How alike pictures of the bare class and the subject are, on the scale of subject fidelity. As cosines: PRES* "
        f"{before:.2f} → {after:.2f}.",
    )


def _variety(one: Evaluation) -> Markup:
    sides = (("before", one.before.div), ("after", one.after.div))
    return _measure(
        "Variety of the class",
        "higher is better",
        gauge(
            [(name, value, f"{value:.2f}") for name, value in sides],
            [("all the same", 0.0), ("real renders", one.oracle_div)],
            0.0,
            max(1.0, one.oracle_div, *(value for _, value in sides)) + 0.02,
        ),
        "How much pictures of the bare class differ among themselves: DIV*, the mean of one minus the cosine.",
    )


def _between(one: Evaluation, before: float, after: float) -> Markup:
    """Two values on the scale from others of the class to the subject; both such scales of the page are the same."""
    shown = [one.before.normalised, one.after.normalised]
    shown += [closeness(one, side.pres) for side in (one.before, one.after) if not isnan(side.pres)]
    return gauge(
        [("before", before, f"{before:.2f}"), ("after", after, f"{after:.2f}")],
        [("others of its class", 0.0), ("real pictures", 1.0)],
        min(-0.1, *shown) - 0.02,
        max(1.1, *shown) + 0.02,
    )


def _measure(title: str, sense: str, drawing: Markup, text: str) -> Markup:
    return tag("article", tag("h3", title, tag("small", sense)), drawing, tag("p", text), class_="measure")
