"""A plan for a person."""

from __future__ import annotations

import json
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.plan.contents import Advice, Arithmetic, Concept, Fit, Memory, Plan


def render(plan: Plan, console: Console) -> None:
    """Print ``plan``, a heading and a few lines for each of its parts."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for heading, lines in _sections(plan):
        for number, line in enumerate(lines):
            table.add_row(heading if number == 0 else "", Text(line))
    console.print(table)


def _sections(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    yield "run", [plan.summary]
    base = ", ".join(f"{name} {count(number)}" for name, number in plan.networks.items())
    yield "model", [f"{plan.model} ({plan.family}): {base} parameters"]
    base_total = sum(plan.networks.get(name, 0) for name in plan.trainable)
    trained = [
        f"{name}: {count(number)} parameters"
        + (f" ({100 * number / whole:.2g} % of it)" if (whole := plan.networks.get(name) or base_total) else "")
        for name, number in plan.trainable.items()
    ]
    yield "trains", trained or ["nothing"]
    yield "pictures", [line for concept in plan.concepts for line in _concept(concept)]
    if len(plan.shapes) > 1 or any(shape.cut_away > 0.01 for shape in plan.shapes):
        yield (
            "shapes",
            [
                f"{shape.width} x {shape.height}: {shape.pictures}, {100 * shape.cut_away:.0f} % cut away"
                for shape in plan.shapes
            ],
        )
    if plan.arithmetic:
        yield "steps", list(_steps(plan.arithmetic))
    if plan.class_images:
        yield (
            "class images",
            [
                f"{images.prompt!r}: {images.present} of {images.needed} are there, "
                f"{images.needed - images.present} to draw, in {images.folder}"
                for images in plan.class_images
            ],
        )
    if plan.caches:
        yield (
            "cache",
            [
                f"{cache.kind}: {cache.present} of {cache.entries} are there, {size(cache.bytes)} in all, "
                f"in {cache.folder}"
                for cache in plan.caches
            ],
        )
    parts = ", ".join(f"{name} {size(number)}" for name, number in plan.memory.parts.items())
    yield (
        "memory",
        [f"about {size(plan.memory.total)} per process: {parts}", plan.memory.formula, *_around(plan.memory)],
    )
    if plan.profile:
        yield "profile", [", ".join(f"{key}: {json.dumps(value)}" for key, value in plan.profile.items())]
    if plan.fits:
        yield "profiles", list(map(_fit, plan.fits))
    if plan.advice:
        yield "launch", list(_advice(plan.advice))
    yield "output", [f"{plan.output.folder} ({plan.output.state})", ", ".join(plan.output.files)]
    if plan.notes:
        yield "notes", list(plan.notes)


def _concept(concept: Concept) -> Iterator[str]:
    small, large = ("{} x {}".format(*pixels) for pixels in (concept.smallest, concept.largest))
    sizes = small if small == large else f"{small} to {large}"
    repeats = f", {concept.repeats} times each" if concept.repeats > 1 else ""
    masks = f", {concept.masked} with a mask" if concept.masked else ""
    yield f"{concept.source}: {concept.pictures} pictures{repeats}, {sizes}, {size(concept.bytes)}{masks}"
    sources = ", ".join(f"{number} from {source}" for source, number in concept.captions.items())
    yield f"captions: {sources}; {concept.example!r}"
    if concept.trigger:
        yield f"trigger {concept.trigger!r}" + (f", class {concept.class_prompt!r}" if concept.class_prompt else "")


def _around(found: Memory) -> Iterator[str]:
    """What is held elsewhere, and at other times."""
    if found.host:
        yield f"{size(found.host)} more in the host's memory; on a CPU, which is the host, nothing is saved"
    yield ", ".join(f"while {phase} about {size(needed)}" for phase, needed in found.phases.items())


def _fit(found: Fit) -> str:
    verdict = "fits" if found.bytes <= found.room else f"does not fit into {size(found.room)}"
    return f"{found.profile}: about {size(found.bytes)} at the most, {verdict}"


def _advice(found: Advice) -> Iterator[str]:
    yield found.reason
    if found.command:
        yield found.command
    for way in found.ways:
        if way.refused:
            yield f"{way.launch}: {way.refused}"
            continue
        host = f", {size(way.host)} in the host's memory" if way.host else ""
        sent = f", {size(way.sent)} sent in a step" if way.sent else ""
        yield f"{way.launch}: about {size(way.bytes)} per process at the most, in {way.phase}{host}{sent}"


def _steps(found: Arithmetic) -> Iterator[str]:
    factors = [
        (found.processes, "processes" if found.processes > 1 else "process"),
        (found.batch_size, "a batch"),
        (found.gradient_accumulation_steps, "accumulated"),
    ]
    product = " x ".join(f"{number} {noun}" for number, noun in factors)
    beside = f" and {found.class_pictures:g} of the class" if found.class_pictures else ""
    yield f"{found.steps} steps, each of {found.subject_pictures:g} subject pictures{beside} ({product})"
    yield f"{found.draws_per_epoch} draws an epoch, so {found.epochs:.3g} epochs"


def count(number: int) -> str:
    """``860 M``."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return str(number)


def size(number: int) -> str:
    """``1.6 GiB``."""
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number} bytes"
