"""What a fine-tuned model is worth, and the page that shows it.

- ``measures``: fidelity, diversity, prompt accuracy, intervals; pure functions over a judge's embeddings.
- ``protocol``: the questions that a model is asked before and after training, and the figures of the answers.
- ``taught``: what a run of the embedded world teaches, a subject or a style, and its questions and figures.
- ``styles``: how far pictures are in a style.
- ``report``: ``report.html``, one self-contained page.
- ``sheet``: before and after on one picture.
- ``study``: several subjects and priors; ``python -m finetune.evaluation.study``.
- ``methods``: all methods, on subjects and styles; ``python -m finetune.evaluation.methods``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Answers": "protocol",
    "Evaluation": "protocol",
    "Figures": "protocol",
    "Questions": "protocol",
    "ask": "protocol",
    "evaluate": "protocol",
    "tinyworld_questions": "protocol",
    "Captioned": "report",
    "Check": "report",
    "Command": "report",
    "ExportedFile": "report",
    "ReportData": "report",
    "Shot": "report",
    "Snapshot": "report",
    "Taught": "taught",
    "read_metrics": "report",
    "shots": "report",
    "write_report": "report",
    "write_sheet": "sheet",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
