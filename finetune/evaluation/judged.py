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


STYLE = (
    "The style is known exactly, so its share in a picture can be measured. A small network that knows every factor of "
    "the embedded world reads from the pictures, with the style undone, whether prompts still count."
)


def judge(data: ReportData) -> Markup | None:
    """Four measures, or why there are none."""
    one = data.evaluation
    if one is None:
        return tag("p", data.no_evaluation, class_="lead") if data.no_evaluation and data.scenes else None
    cards = [_fidelity(one)]
    cards += [] if isnan(one.after.accuracy) else [_accuracy(one)]
    cards += [] if isnan(one.after.pres) else [_class(one), _variety(one)]
    lead = STYLE if one.kind == "style" else LEAD
    return join([tag("p", lead, class_="lead"), tag("div", *cards, class_="measures")])


def percent(share: float) -> str:
    """0.83 as "83 %"."""
    return f"{100 * share:.0f} %"


def _fidelity(one: Evaluation) -> Markup:
    before, after = one.before, one.after
    drawing = _between(one, before.normalised, after.normalised)
    if one.kind == "style":
        parts = ", ".join(f"{name} {before.parts[name]:.2f} → {value:.2f}" for name, value in after.parts.items())
        words = (
            "How far pictures of new scenes are in the style, between plain renders (0) and renders in the style that "
            f"no training saw (1): the product of its parts, {parts}."
        )
        return _measure("Style fidelity", "higher is better", drawing, words)
    return _measure(
        "Subject fidelity",
        "higher is better",
        drawing,
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
    if one.kind == "style":
        return _measure(
            "Other pictures stay plain",
            "lower is better",
            _between(one, before, after),
            "How much of the style, its colours or its lines, is in the same scenes although their prompts do not ask "
            f"for it, on the scale of style fidelity: PRES* {before:.2f} → {after:.2f}.",
        )
    return _measure(
        "The class stays itself",
        "lower is better",
        _between(one, closeness(one, before), closeness(one, after)),
        "How alike pictures of the bare class and the subject are, on the scale of subject fidelity. As cosines: PRES* "
        f"{before:.2f} → {after:.2f}.",
    )


def _variety(one: Evaluation) -> Markup:
    sides = (("before", one.before.div), ("after", one.after.div))
    of = "one plain prompt" if one.kind == "style" else "the bare class"
    return _measure(
        "Variety without the style" if one.kind == "style" else "Variety of the class",
        "higher is better",
        gauge(
            [(name, value, f"{value:.2f}") for name, value in sides],
            [("all the same", 0.0), ("real renders", one.oracle_div)],
            0.0,
            max(1.0, one.oracle_div, *(value for _, value in sides)) + 0.02,
        ),
        f"How much pictures of {of} differ among themselves: DIV*, the mean of one minus the cosine.",
    )


def _between(one: Evaluation, before: float, after: float) -> Markup:
    """Two values on the scale from floor to ceiling; both such scales of the page are the same."""
    ends = ("plain renders", "renders in it") if one.kind == "style" else ("others of its class", "real pictures")
    shown = [one.before.normalised, one.after.normalised]
    shown += [closeness(one, side.pres) for side in (one.before, one.after) if not isnan(side.pres)]
    return gauge(
        [("before", before, f"{before:.2f}"), ("after", after, f"{after:.2f}")],
        [(ends[0], 0.0), (ends[1], 1.0)],
        min(-0.1, *shown) - 0.02,
        max(1.1, *shown) + 0.02,
    )


def _measure(title: str, sense: str, drawing: Markup, text: str) -> Markup:
    return tag("article", tag("h3", title, tag("small", sense)), drawing, tag("p", text), class_="measure")
