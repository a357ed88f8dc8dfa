"""The page's charts: a loss curve as SVG, and dots on a scale between a floor and a ceiling as HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from finetune.evaluation.markup import Markup, join, tag

WIDTH, HEIGHT = 760, 280
LEFT, RIGHT, TOP, BOTTOM = 46, 84, 14, 32
POINTS = 600  # of a curve; longer ones are thinned


def loss_curve(steps: Sequence[int], curves: Mapping[str, Sequence[float]]) -> Markup:
    """Curves over steps, each faint as measured and strong as smoothed, named at its end.

    Args:
        steps: increasing, [N].
        curves: name -> values [N]; those that are not finite are left out.
    """
    keep = range(0, len(steps), max(1, math.ceil(len(steps) / POINTS)))
    smooth = {name: smoothed(values) for name, values in curves.items()}
    first, last = steps[0], max(steps[-1], steps[0] + 1)
    top = nice_ceiling(_quantile([v for values in curves.values() for v in values if math.isfinite(v)], 0.98))

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (1 - min(max(value, 0.0), top) / top) * (HEIGHT - TOP - BOTTOM)

    def path(values: Sequence[float], kind: str) -> Markup:
        points = [f"{x(steps[i]):.1f} {y(values[i]):.1f}" for i in keep if math.isfinite(values[i])]
        return tag("path", d="M" + "L".join(points), class_=kind) if points else Markup("")

    parts = [_grid(x, y, top, first, last)]
    ends = {name: y(row[-1]) for name, row in smooth.items() if row and math.isfinite(row[-1])}
    for index, (name, at) in enumerate(zip(ends, _apart(list(ends.values())), strict=True)):
        parts.append(path(curves[name], f"raw line{index}"))
        parts.append(path(smooth[name], f"smooth line{index}"))
        label = tag("text", name, x=WIDTH - RIGHT + 8, y=f"{at + 4:.1f}", class_=f"label line{index}")
        parts.append(label)
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", class_="curve", role="img", aria_label="Loss curve")


def smoothed(values: Sequence[float], width: float | None = None) -> list[float]:
    """Exponential moving average over about ``width`` values (a twentieth of them), without a bias to the first."""
    keep = 1 - 1 / max(1.0, width or len(values) / 20)
    total, weight, result = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight if weight else math.nan)
    return result


def nice_ceiling(value: float) -> float:
    """The next 1, 1.5, 2, 3, 4, 6 or 8 times a power of ten."""
    if not value > 0 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.5, 2, 3, 4, 6, 8, 10) if step * power >= value * (1 - 1e-9))


def gauge(
    rows: Sequence[tuple[str, float, str]], marks: Sequence[tuple[str, float]], low: float, high: float
) -> Markup:
    """Dots on a scale.

    Args:
        rows: name, value and what to write beside it; the last row is the one that stands out.
        marks: name and value of the lines that give the scale its meaning.
        low, high: ends of the scale; values beyond are drawn at the ends.
    """

    def at(value: float) -> str:
        share = (value - low) / (high - low)
        return f"{100 * min(max(share, 0.0), 1.0):.2f}%"

    lines = [
        tag("i", class_="mark", style=f"left:{at(value)}") for _, value in marks if low - 1e-9 <= value <= high + 1e-9
    ]
    tracks = [
        tag(
            "div",
            tag("span", name, class_="who"),
            tag("div", tag("b", style=f"left:{at(value)}"), tag("u", style=f"width:{at(value)}"), class_="track"),
            tag("span", text, class_="value"),
            class_="row after" if index == len(rows) - 1 else "row before",
        )
        for index, (name, value, text) in enumerate(rows)
    ]
    names = [tag("span", name, style=f"left:{at(value)}", class_=_side(value, low, high)) for name, value in marks]
    return tag("div", tag("div", *lines, class_="marks"), *tracks, tag("div", *names, class_="names"), class_="gauge")


def _side(value: float, low: float, high: float) -> str:
    share = (value - low) / (high - low)
    return "start" if share < 0.25 else "end" if share > 0.75 else "middle"


def _grid(x: Callable[[float], float], y: Callable[[float], float], top: float, first: float, last: float) -> Markup:
    parts = []
    for index in range(5):
        value = top * index / 4
        height, kind = f"{y(value):.1f}", "grid" if index else "zero"
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=height, y2=height, class_=kind))
        parts.append(tag("text", f"{value:.3g}", x=LEFT - 8, y=f"{y(value) + 4:.1f}", class_="right"))
    for step in ticks(first, last):
        parts.append(tag("text", f"{step}", x=f"{x(step):.1f}", y=HEIGHT - 10, class_="middle"))
    return join(parts)


def ticks(first: float, last: float) -> list[int]:
    """Three to seven round whole numbers between ``first`` and ``last``, whichever of them there are."""
    stride = max(1, round(nice_ceiling((last - first) / 6)))
    start = math.ceil(first / stride) * stride
    return list(range(start, math.floor(last) + 1, stride))


def _apart(heights: list[float], gap: float = 16.0) -> list[float]:
    """Heights of labels moved down until none covers another."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    result = list(heights)
    for above, below in pairwise(order):
        result[below] = max(result[below], result[above] + gap)
    return result


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 1.0
