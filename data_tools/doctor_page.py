"""A diagnosis as a page with the pictures that it is about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from data_tools.doctor import LEVELS, Diagnosis, Finding, Level
from finetune.data import decoding
from finetune.data.sources import Picture
from finetune.evaluation.markup import Markup, document, join, picture, tag

HEADINGS: Mapping[Level, tuple[str, str]] = {
    "refused": ("Refused", "A run would stop at these before it begins, and write nothing."),
    "doubtful": ("Doubtful", "A run goes on, and learns from them what it probably should not."),
    "note": ("Worth knowing", "Nothing has to be done."),
}
MOST_SHOWN = 12  # pictures of a finding
MOST_THUMBNAILS = 400  # pictures at the end


def page(diagnosis: Diagnosis) -> str:
    """The page as HTML."""
    counts = {level: len(diagnosis.at(level)) for level in LEVELS}
    state = "bad" if counts["refused"] else "mixed" if counts["doubtful"] else ""
    header = tag(
        "header",
        tag("p", "pictures", class_="kind"),
        tag("h1", diagnosis.source),
        tag("p", verdict(diagnosis), class_=f"verdict {state}".strip()),
        tag(
            "dl",
            *(_number(str(number), name) for name, number in _numbers(diagnosis, counts).items()),
            class_="numbers",
        ),
    )
    return document(title=f"Pictures of {diagnosis.source}", header=header, sections=join(list(_sections(diagnosis))))


def verdict(diagnosis: Diagnosis) -> str:
    """The diagnosis in a sentence."""
    refused, doubtful = len(diagnosis.at("refused")), len(diagnosis.at("doubtful"))
    pictures = f"{len(diagnosis.pictures)} picture{'s' if len(diagnosis.pictures) != 1 else ''}"
    if refused:
        return f"{refused} thing{'s' if refused != 1 else ''} would stop a run; {pictures} can be used."
    if doubtful:
        return f"{pictures} can be used; {doubtful} thing{'s are' if doubtful != 1 else ' is'} doubtful."
    return f"{pictures} can be used, and nothing is wrong with them."


def _numbers(diagnosis: Diagnosis, counts: Mapping[Level, int]) -> dict[str, int]:
    levels = {str(level): count for level, count in counts.items()}
    return {"pictures": len(diagnosis.pictures), **levels, "dropped": diagnosis.dropped}


def _number(value: str, name: str) -> Markup:
    return tag("div", tag("dt", name), tag("dd", value), class_="number")


def _sections(diagnosis: Diagnosis) -> Iterator[Markup]:
    for level in LEVELS:
        if found := diagnosis.at(level):
            heading, lead = HEADINGS[level]
            rows = [_finding(finding, diagnosis.pictures) for finding in found]
            yield _section(heading, lead, join(rows))
    if diagnosis.shapes:
        facts = [
            tag(
                "div",
                tag("dt", f"{shape.width} x {shape.height}"),
                tag("dd", f"{shape.pictures}, {100 * shape.cut_away:.0f} % cut away"),
            )
            for shape in diagnosis.shapes
        ]
        yield _section("Shapes", "What pictures are cut to, and how many.", tag("dl", *facts, class_="facts"))
    shown = list(diagnosis.pictures.values())[:MOST_THUMBNAILS]
    some = f" The first {len(shown)} of {len(diagnosis.pictures)}." if len(shown) < len(diagnosis.pictures) else ""
    gallery = tag("div", *map(_figure, shown), class_="gallery")
    yield _section("All pictures", f"With the captions that were found.{some}", gallery)


def _finding(finding: Finding, pictures: Mapping[str, Picture]) -> Markup:
    shown = [pictures[name] for name in finding.pictures[:MOST_SHOWN] if name in pictures]
    return tag(
        "article",
        tag("h3", finding.kind, tag("small", finding.text)),
        tag("div", *map(_figure, shown), class_="gallery") if shown else None,
        class_="finding",
        style="margin-bottom: 26px",
    )


def _figure(one: Picture) -> Markup:
    image = decoding.rgb(decoding.decode(decoding.read(one.path), one.path))
    size = f"{one.facts.width} x {one.facts.height}"
    caption = " / ".join(text for text in one.captions if text)
    return tag(
        "figure",
        picture(image, f"{one.path.name}, {size}"),
        tag("figcaption", f"{one.path.name}, {size}", _below(caption)),
    )


def _below(caption: str) -> Markup | None:
    return tag("div", caption[:160]) if caption else None


def _section(heading: str, lead: str, content: Markup) -> Markup:
    return tag("section", tag("h2", heading), tag("p", lead, class_="lead"), content, class_="section")
