"""The sections of the report, each a function from ``ReportData`` to HTML, "" where it has nothing to show."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from finetune.evaluation.charts import gauge, loss_curve
from finetune.evaluation.markup import Markup, escape, join, picture, tag
from finetune.evaluation.report import Captioned, ReportData, Shot
from finetune.evaluation.verdict import Verdict, closeness, verdict

if TYPE_CHECKING:
    from PIL import Image

SHOWN_CLASS_IMAGES = 24
SHOWN_TEASERS = 6


def page(data: ReportData) -> dict[str, Markup]:
    """What the template asks for: title, header, navigation and sections."""
    made = [(name, link, title, body) for name, link, title, build in SECTIONS if (body := build(data))]
    sections = [tag("section", tag("h2", title), body, id=name, class_="section") for name, _, title, body in made]
    links = [tag("a", link, href=f"#{name}") for name, link, _, _ in made]
    return {
        "title": escape(data.title),
        "header": _header(data),
        "nav": tag("nav", *links, aria_label="Sections") if links else Markup(""),
        "sections": join(sections),
    }


def _header(data: ReportData) -> Markup:
    words = _verdict(data)
    return tag(
        "header",
        tag(
            "div",
            tag("p", data.kind, class_="kind") if data.kind else None,
            tag("h1", _prompt(data.title, data.trigger)),
            tag("p", words.text, class_=f"verdict {words.grade}") if words else None,
            class_="words",
        ),
        _teaser(data),
        _numbers(data),
    )


def _verdict(data: ReportData) -> Verdict | None:
    if data.verdict is not None:
        return Verdict(data.verdict, "good")
    if data.evaluation is None:
        return None
    noun = data.of_class.prompt.split()[-1] if data.of_class else data.title.split()[-1]
    return verdict(data.evaluation, data.title, noun)


def _teaser(data: ReportData) -> Markup | None:
    """The pictures that were shown, and the first picture of each new scene before and after, chosen by nobody."""
    shots = [shot for shot in data.scenes if shot.before and shot.after][:SHOWN_TEASERS]
    if not data.subject or not shots:
        return None
    shown = [picture(row.image, row.caption) for row in data.subject[:5]]

    def strip(words: str, side: str) -> Markup:
        drawn = [picture(getattr(shot, side)[0], f"{shot.prompt} ({side})") for shot in shots]
        return tag("div", tag("div", *drawn, class_="strip"), tag("p", words), class_=side)

    return tag(
        "div",
        tag("div", tag("div", *shown, class_="mosaic"), tag("p", "what it was shown"), class_="shown"),
        tag("div", strip("asked for it in new scenes, before", "before"), strip("and after", "after"), class_="drawn"),
        class_="teaser",
    )


def _numbers(data: ReportData) -> Markup | None:
    numbers: list[tuple[str, str, str]] = []
    if one := data.evaluation:
        numbers += [
            ("subject fidelity", _percent(one.after.normalised), f"before {_percent(one.before.normalised)}"),
            ("prompt accuracy", _percent(one.after.accuracy), f"before {_percent(one.before.accuracy)}"),
        ]
    if data.seconds is not None:
        part = f"{_duration(data.training_seconds)} of it training" if data.training_seconds else "in all"
        numbers.append(("time", _duration(data.seconds), part))
    if data.peak_memory is not None:
        numbers.append(("peak memory", _size(data.peak_memory), "of the process"))
    cards = [
        tag("div", tag("dt", name), tag("dd", value, tag("small", note)), class_="number")
        for name, value, note in numbers
    ]
    return tag("dl", *cards, class_="numbers") if cards else None


def _subject(data: ReportData) -> Markup | None:
    if not data.subject:
        return None
    count = len(data.subject)
    lead = f"All that the model was taught with: {count} picture{'s' if count != 1 else ''} and their captions."
    return join([tag("p", lead, class_="lead"), _captioned(data.subject, data.trigger)])


def _scenes(data: ReportData) -> Markup | None:
    if not data.scenes:
        return None
    lead = (
        "The same prompts and the same noise before and after training. None of these scenes is among the pictures "
        "that it was shown. The pictures after training come from the exported file, loaded again."
    )
    cards = [_shot(shot, data.trigger) for shot in data.scenes]
    if data.instance:
        cards.append(_shot(data.instance, data.trigger, "wide"))
    return join([tag("p", lead, class_="lead"), _toggle(), tag("div", *cards, class_="shots")])


def _class(data: ReportData) -> Markup | None:
    if not data.of_class:
        return None
    lead = (
        "The prompt without the rare token. Prior preservation is there so that these pictures keep their variety; "
        "without it they drift towards the subject."
    )
    return join(
        [tag("p", lead, class_="lead"), _toggle(), tag("div", _shot(data.of_class, "", "wide"), class_="shots")]
    )


def _judge(data: ReportData) -> Markup | None:
    one = data.evaluation
    if one is None:
        return tag("p", data.no_evaluation, class_="lead") if data.no_evaluation and data.scenes else None
    before, after = one.before, one.after
    others, itself = "others of its class", "real pictures"
    scaled = [(name, closeness(one, value)) for name, value in (("before", before.pres), ("after", after.pres))]
    low = min(-0.1, before.normalised, after.normalised, *(value for _, value in scaled)) - 0.02
    high = max(1.1, before.normalised, after.normalised) + 0.02
    ends = [(others, 0.0), (itself, 1.0)]
    words = f"floor {one.floor:.2f}, ceiling {one.ceiling:.2f}"
    fidelity = gauge(
        [
            ("before", before.normalised, f"{before.normalised:.2f}"),
            ("after", after.normalised, f"{after.normalised:.2f}"),
        ],
        ends,
        low,
        high,
    )
    pres = gauge([(name, value, f"{value:.2f}") for name, value in scaled], ends, low, high)
    accuracy = gauge(
        [(name, side.accuracy, _percent(side.accuracy)) for name, side in (("before", before), ("after", after))],
        [("none", 0.0), ("real renders", one.oracle_accuracy)],
        0.0,
        1.02,
    )
    parts = ", ".join(
        f"{name} {_percent(before.accuracies[name])} → {_percent(value)}" for name, value in after.accuracies.items()
    )
    div = gauge(
        [(name, side.div, f"{side.div:.2f}") for name, side in (("before", before), ("after", after))],
        [("all the same", 0.0), ("real renders", one.oracle_div)],
        0.0,
        max(1.0, one.oracle_div, before.div, after.div) + 0.02,
    )
    cards = [
        _measure(
            "Subject fidelity",
            "higher is better",
            fidelity,
            "How alike the subject in new scenes and its real pictures are, between other individuals of its class (0) "
            f"and real pictures that no training saw (1). As cosines: DINO* {before.fidelity:.2f} → "
            f"{after.fidelity:.2f}, {words}.",
        ),
        _measure(
            "Prompt accuracy",
            "higher is better",
            accuracy,
            f"How much of what the prompts for new scenes name is there. {parts}.".replace("name is", "name is really"),
        ),
        _measure(
            "The class stays itself",
            "lower is better",
            pres,
            "How alike pictures of the bare class and the subject are, on the scale of subject fidelity. As cosines: "
            f"PRES* {before.pres:.2f} → {after.pres:.2f}.",
        ),
        _measure(
            "Variety of the class",
            "higher is better",
            div,
            "How much pictures of the bare class differ among themselves (DIV*, mean of one minus the cosine).",
        ),
    ]
    lead = (
        "A small network that knows every factor of the embedded world, and that took no part in training, looks at "
        "all of these pictures."
    )
    return join([tag("p", lead, class_="lead"), tag("div", *cards, class_="measures")])


def _measure(title: str, sense: str, drawing: Markup, text: str) -> Markup:
    return tag("article", tag("h3", title, tag("small", sense)), drawing, tag("p", text), class_="measure")


def _loss(data: ReportData) -> Markup | None:
    if len(data.metrics) < 2:
        return None
    steps = [int(row["step"]) for row in data.metrics]
    parts = {"subject": "loss_instance", "class": "loss_prior"}
    found = {name: key for name, key in parts.items() if any(key in row for row in data.metrics)}
    keys = found if len(found) == 2 else {"loss": "loss"}
    curves = {name: [float(row.get(key, "nan")) for row in data.metrics] for name, key in keys.items()}
    lead = "Faint as measured, strong as a moving average. Each step sees other noise, so a loss that looks flat can learn."
    return join([tag("p", lead, class_="lead"), tag("div", loss_curve(steps, curves), class_="chart")])


def _snapshots(data: ReportData) -> Markup | None:
    if not data.snapshots:
        return None
    prompts = list(dict.fromkeys(shot.prompt for shot in data.snapshots))
    rows = []
    for prompt in prompts:
        cells = [
            tag("figure", *[picture(image, prompt) for image in shot.images], tag("figcaption", f"step {shot.step}"))
            for shot in data.snapshots
            if shot.prompt == prompt
        ]
        rows.append(tag("div", tag("p", _prompt(prompt, data.trigger), class_="prompt"), tag("div", *cells)))
    return tag("div", *rows, class_="film")


def _class_images(data: ReportData) -> Markup | None:
    if not data.class_images:
        return None
    shown = data.class_images[:SHOWN_CLASS_IMAGES]
    total = max(data.class_image_count, len(data.class_images))
    lead = (
        f"{total} pictures that the untouched model drew of its class stood beside the subject in training"
        f"{f'; {len(shown)} of them are here' if len(shown) < total else ''}."
    )
    wall = [picture(row.image, row.caption) for row in shown]
    return join([tag("p", lead, class_="lead"), tag("div", *wall, class_="wall")])


def _files(data: ReportData) -> Markup | None:
    if not data.exported:
        return None
    cards = []
    for one in data.exported:
        checks = [tag("li", check.text, class_="passed" if check.passed else "failed") for check in one.checks]
        cards.append(
            tag(
                "article",
                tag("h3", tag("code", one.name), tag("small", f"{one.layout}, {_size(one.size)}")),
                tag("ul", *checks, class_="checks") if checks else None,
            )
        )
    return tag("div", *cards, class_="files")


def _use(data: ReportData) -> Markup | None:
    blocks = [
        tag(
            "div",
            tag("p", one.purpose, tag("button", "Copy", type="button", class_="copy")),
            tag("pre", tag("code", one.code.strip("\n"))),
            class_="command",
        )
        for one in data.commands
    ]
    return join(blocks) if blocks else None


def _details(data: ReportData) -> Markup | None:
    parts: list[str | None] = []
    if data.notes:
        parts.append(tag("ul", *[tag("li", note) for note in data.notes], class_="notes"))
    if data.facts:
        rows = [tag("div", tag("dt", name), tag("dd", value)) for name, value in data.facts.items()]
        parts.append(tag("dl", *rows, class_="facts"))
    if data.recipe:
        recipe = tag("pre", tag("code", data.recipe.strip("\n")))
        parts.append(tag("details", tag("summary", "The recipe, with every default"), recipe))
    return join(parts) if parts else None


def _shot(shot: Shot, trigger: str, kind: str | None = None) -> Markup:
    def side(name: str, images: Sequence[Image.Image]) -> Markup:
        pictures = [picture(image, f"{shot.prompt} ({name})") for image in images]
        return tag("div", tag("span", name), tag("div", *pictures, class_="pictures"), class_=f"side {name}")

    sides = [side("before", shot.before), side("after", shot.after)]
    heading = tag("h3", _prompt(shot.prompt, trigger), class_="prompt")
    return tag("article", heading, tag("div", *sides, class_="pair"), class_=kind)


def _captioned(rows: Sequence[Captioned], trigger: str) -> Markup:
    figures = [
        tag("figure", picture(row.image, row.caption), tag("figcaption", _prompt(row.caption, trigger))) for row in rows
    ]
    return tag("div", *figures, class_="gallery")


def _toggle() -> Markup:
    choices = [("both", "Side by side"), ("before", "Before"), ("after", "After")]
    buttons = [
        tag("button", text, type="button", data_view=name, aria_pressed="true" if name == "both" else "false")
        for name, text in choices
    ]
    return tag("div", *buttons, class_="toggle", role="group", aria_label="What to show")


def _prompt(prompt: str, trigger: str) -> Markup:
    """A prompt with the rare token set apart."""
    if not trigger:
        return escape(prompt)
    parts = re.split(rf"(?<!\w)({re.escape(trigger)})(?!\w)", prompt)
    return join([tag("mark", part) if part == trigger else escape(part) for part in parts])


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )


def _size(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit != "MB" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


SECTIONS: tuple[tuple[str, str, str, Callable[[ReportData], Markup | None]], ...] = (
    ("subject", "Subject", "What it was shown", _subject),
    ("scenes", "New scenes", "The subject in new scenes", _scenes),
    ("class", "Class", "The bare class", _class),
    ("judge", "Judge", "What the judge says", _judge),
    ("loss", "Loss", "Loss", _loss),
    ("samples", "Progress", "While it learnt", _snapshots),
    ("class-images", "Class images", "What stood for the class", _class_images),
    ("files", "Files", "What was written", _files),
    ("use", "Use", "Use it", _use),
    ("details", "Details", "How it was made", _details),
)
