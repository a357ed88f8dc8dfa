"""``report.html``: what a run did, on one page that needs nothing else and asks no server for anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import files
from finetune.evaluation.markup import document
from finetune.evaluation.protocol import Answers, Evaluation, Questions

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Captioned:
    """A picture and what stands below it."""

    image: Image.Image
    caption: str


@dataclass(frozen=True)
class Shot:
    """The same prompt and seeds before and after."""

    prompt: str
    before: Sequence[Image.Image]
    after: Sequence[Image.Image]


@dataclass(frozen=True)
class Snapshot:
    """Pictures of one prompt drawn while training, after ``step`` optimizer steps."""

    step: int
    prompt: str
    images: Sequence[Image.Image]


@dataclass(frozen=True)
class Check:
    """One question put to an exported file, and its answer; ``finetune.export``'s own checks serve as well."""

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class ExportedFile:
    """A file or folder of ``adapters/``: its name relative to the run, for whom it is, its size and its checks."""

    name: str
    layout: str
    size: int
    checks: Sequence[Check] = ()


@dataclass(frozen=True)
class Command:
    """Something to copy: what it is for, and the text."""

    purpose: str
    code: str


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything that the page shows. Parts that are missing are left out of the page.

    Attributes:
        title: what was taught, for example "zib heart".
        kind: the run in a few words, for example "DreamBooth, LoRA of rank 16, prior by class images".
        triggers: the rare words, set in colour wherever a prompt has one.
        verdict: one sentence; made of the judge's figures where it is not given.
        subject: the pictures that were taught.
        scenes: the subject in new scenes, before and after.
        instance: the prompt that was taught, before and after.
        of_class: the bare class prompt, before and after.
        plain: other prompts that should draw what they did before: scenes without the words of a style.
        class_images: some of the pictures that stood for the class in training; ``class_image_count`` of all.
        evaluation: the judge's figures; ``no_evaluation`` says why there are none.
        metrics: one mapping per logged step with ``step``, ``loss`` and, where they are logged, ``loss_instance`` and
            ``loss_prior``; ``read_metrics`` reads them.
        snapshots: pictures drawn while training.
        exported: what was written, and what was tried on it.
        commands: how to use it.
        recipe: the resolved recipe as YAML.
        facts: versions, machine, processes and the like: name -> value.
        notes: what should not pass unseen: dropped pictures, cut captions.
        seconds: of the whole run, without installation. training_seconds: of the loop.
        peak_memory: bytes, of the process at its largest.
    """

    title: str
    kind: str = ""
    triggers: Sequence[str] = ()
    verdict: str | None = None
    subject: Sequence[Captioned] = ()
    scenes: Sequence[Shot] = ()
    instance: Shot | None = None
    of_class: Shot | None = None
    plain: Sequence[Shot] = ()
    class_images: Sequence[Captioned] = ()
    class_image_count: int = 0
    evaluation: Evaluation | None = None
    no_evaluation: str = "The judge knows the embedded world only; it has no opinion on photographs."
    metrics: Sequence[Mapping[str, Any]] = ()
    snapshots: Sequence[Snapshot] = ()
    exported: Sequence[ExportedFile] = ()
    commands: Sequence[Command] = ()
    recipe: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    seconds: float | None = None
    training_seconds: float | None = None
    peak_memory: int | None = None


def shots(questions: Questions, before: Answers, after: Answers) -> dict[str, Any]:
    """The ``scenes``, ``instance``, ``of_class`` and ``plain`` of ``ReportData``, from what was asked and answered."""
    rows = zip(questions.scenes, before.scenes, after.scenes, strict=True)
    plain = zip(questions.plain, before.plain, after.plain, strict=True)
    return {
        "plain": tuple(Shot(*row) for row in plain),
        "scenes": tuple(Shot(prompt, old, new) for (prompt, _), old, new in rows),
        "instance": Shot(questions.instance, before.instance, after.instance),
        "of_class": Shot(questions.class_prompt, before.of_class, after.of_class) if questions.class_prompt else None,
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl`` that have a loss, in order of their steps.

    A step that was logged twice (a run that was stopped and continued) counts once, the later time. A last line that
    was cut off is passed over.
    """
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "loss" in row and "step" in row:
            rows[int(row["step"])] = row
    return [rows[step] for step in sorted(rows)]


def write_report(folder: Path, report: ReportData) -> Path:
    """Write ``folder/report.html``, whole or not at all, and return its path."""
    from finetune.evaluation.sections import page

    path = folder / "report.html"
    files.write_text(path, document(**page(report)))
    return path
