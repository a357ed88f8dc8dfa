"""Fill ``docs/tinyworld.md``: its pictures, and the tables between its markers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import UserError
from finetune.tinyworld import commands, pipeline

if TYPE_CHECKING:
    from finetune.tinyworld.gates import Gate

SUBJECTS, STYLES = [18, 101, 102, 103], [1, 2, 3, 4]


def write(docs: Path, count: int = 200) -> None:
    """Write ``docs/images/tinyworld-*.png`` and the tables of ``docs/tinyworld.md``.

    Raises:
        UserError: when the document or one of its markers is missing.
    """
    from finetune.tinyworld import gates as gates_
    from finetune.tinyworld.judge import Judge

    images = docs / "images"
    commands.write_world_sheet(images / "tinyworld-world.png")
    commands.write_subject_sheet(images / "tinyworld-subjects.png", SUBJECTS)
    commands.write_style_sheet(images / "tinyworld-styles.png", STYLES)
    commands.write_samples(images / "tinyworld-base.png")
    commands.write_samples(images / "tinyworld-class.png", ["a star"] * 24)
    commands.write_samples(images / "tinyworld-flow.png", model="tinyworld-flow")
    gates, accuracy = commands.check_gates(count=count)
    flow = gates_.base_accuracy(pipeline("tinyworld-flow"), Judge.load(), count)
    oracle = gates_.oracle_accuracy(Judge.load(), count)
    fill(docs / "tinyworld.md", "gates", gate_table(gates))
    fill(docs / "tinyworld.md", "accuracy", accuracy_table(accuracy, flow, oracle))


def gate_table(gates: Sequence[Gate]) -> str:
    """A row for each gate."""
    rows = [
        f"| {gate.name} | {gate.value:.3f} | {'≥' if gate.at_least else '≤'} {gate.limit:g} "
        f"| {'passed' if gate.passed else '**missed**'} |"
        for gate in gates
    ]
    return "\n".join(["| gate | figure | limit | |", "|---|---|---|---|", *rows])


def accuracy_table(accuracy: Mapping[str, float], flow: Mapping[str, float], oracle: Mapping[str, float]) -> str:
    """Prompt accuracy by factor, of the bases and of the renderer."""
    rows = [f"| {name} | {value:.1%} | {flow[name]:.1%} | {oracle[name]:.1%} |" for name, value in accuracy.items()]
    head = "| factor | the base's pictures | the flow-matching base's | the renderer's |"
    return "\n".join([head, "|---|---|---|---|", *rows])


def fill(document: Path, marker: str, text: str) -> None:
    """Replace what stands between ``<!-- marker -->`` and ``<!-- /marker -->``.

    Raises:
        UserError: when the document or the marker is missing.
    """
    if not document.exists():
        raise UserError(f"{document} does not exist; expected the document to fill")
    before = document.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
    if not pattern.search(before):
        raise UserError(f"{document} has no <!-- {marker} --> … <!-- /{marker} -->; expected both")
    after = pattern.sub(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", before)
    document.write_text(after, encoding="utf-8")
