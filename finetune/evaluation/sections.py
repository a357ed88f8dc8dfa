"""The sections of the report, each a function from ``ReportData`` to HTML, "" where it has nothing to show."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import isnan
from typing import TYPE_CHECKING

from finetune.evaluation.charts import loss_curve
from finetune.evaluation.judged import judge, percent
from finetune.evaluation.markup import Markup, escape, join, picture, tag
from finetune.evaluation.report import Captioned, ReportData, Shot
from finetune.evaluation.verdict import Verdict, verdict

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
            tag("h1", _prompt(data.title, data.triggers)),
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
        return tag("div", tag("p", words), tag("div", *drawn, class_="strip"), class_=side)

    return tag(
        "div",
        tag("div", tag("p", "What it was shown"), tag("div", *shown, class_="mosaic"), class_="shown"),
        tag("div", strip("Asked for it in new scenes, before", "before"), strip("and after", "after"), class_="drawn"),
        class_="teaser",
    )


def _numbers(data: ReportData) -> Markup | None:
    numbers: list[tuple[str, str, str]] = []
    if one := data.evaluation:
        pairs = {f"{one.kind} fidelity": "normalised", "prompt accuracy": "accuracy"}
        sides = [(name, getattr(one.before, key), getattr(one.after, key)) for name, key in pairs.items()]
        numbers += [(name, percent(after), f"before {percent(old)}") for name, old, after in sides if not isnan(after)]
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
    return join([tag("p", lead, class_="lead"), _captioned(data.subject, data.triggers)])


def _scenes(data: ReportData) -> Markup | None:
    if not data.scenes:
        return None
    lead = (
        "The same prompts and the same noise before and after training. None of these scenes is among the pictures "
        "that it was shown. The pictures after training come from the exported file, loaded again."
    )
    cards = [_shot(shot, data.triggers) for shot in data.scenes]
    if data.instance:
        cards.append(_shot(data.instance, data.triggers, "wide"))
    return join([tag("p", lead, class_="lead"), _toggle(), tag("div", *cards, class_="shots")])


def _class(data: ReportData) -> Markup | None:
    shots = [_shot(data.of_class, (), "wide")] if data.of_class else []
    shots += [_shot(shot, ()) for shot in data.plain]
    if not shots:
        return None
    lead = (
        "The prompt without the rare token. Prior preservation is there so that these pictures keep their variety; "
        "without it they drift towards the subject."
        if data.of_class
        else "The same scenes without the style's words: they should look as they did before."
    )
    return join([tag("p", lead, class_="lead"), _toggle(), tag("div", *shots, class_="shots")])


def _loss(data: ReportData) -> Markup | None:
    if len(data.metrics) < 2:
        return None
    steps = [int(row["step"]) for row in data.metrics]
    parts = {"subject": "loss_instance", "class": "loss_prior"}
    found = {name: key for name, key in parts.items() if any(row.get(key) for row in data.metrics)}
    keys = found if len(found) == 2 else {"loss": "loss"}
    curves = {name: [float(row.get(key, "nan")) for row in data.metrics] for name, key in keys.items()}
    lead = "Faint as measured, strong as a moving average. The noise of a step moves it more than what is learnt."
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
        rows.append(tag("div", tag("p", _prompt(prompt, data.triggers), class_="prompt"), tag("div", *cells)))
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
        checks = [
            tag(
                "li",
                check.name,
                tag("small", check.detail) if check.detail else None,
                class_="passed" if check.passed else "failed",
            )
            for check in one.checks
        ]
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


def _shot(shot: Shot, triggers: Sequence[str], kind: str | None = None) -> Markup:
    def side(name: str, images: Sequence[Image.Image]) -> Markup:
        pictures = [picture(image, f"{shot.prompt} ({name})") for image in images]
        return tag("div", tag("span", name), tag("div", *pictures, class_="pictures"), class_=f"side {name}")

    sides = [side("before", shot.before), side("after", shot.after)]
    heading = tag("h3", _prompt(shot.prompt, triggers), class_="prompt")
    return tag("article", heading, tag("div", *sides, class_="pair"), class_=kind)


def _captioned(rows: Sequence[Captioned], triggers: Sequence[str]) -> Markup:
    figures = [
        tag("figure", picture(row.image, row.caption), tag("figcaption", _prompt(row.caption, triggers)))
        for row in rows
    ]
    return tag("div", *figures, class_="gallery")


def _toggle() -> Markup:
    choices = [("both", "Side by side"), ("before", "Before"), ("after", "After")]
    buttons = [
        tag("button", text, type="button", data_view=name, aria_pressed="true" if name == "both" else "false")
        for name, text in choices
    ]
    return tag("div", *buttons, class_="toggle", role="group", aria_label="What to show")


def _prompt(prompt: str, triggers: Sequence[str]) -> Markup:
    """A prompt with its rare words set apart."""
    words = sorted(filter(None, triggers), key=len, reverse=True)
    if not words:
        return escape(prompt)
    parts = re.split(rf"(?<!\w)({'|'.join(map(re.escape, words))})(?!\w)", prompt)
    return join([tag("mark", part) if part in words else escape(part) for part in parts])


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
    ("scenes", "New scenes", "In new scenes", _scenes),
    ("class", "Without it", "Without the rare word", _class),
    ("judge", "Judge", "What the judge says", judge),
    ("loss", "Loss", "Loss", _loss),
    ("samples", "Progress", "While it learnt", _snapshots),
    ("class-images", "Class images", "What stood for the class", _class_images),
    ("files", "Files", "What was written", _files),
    ("use", "Use", "Use it", _use),
    ("details", "Details", "How it was made", _details),
)
