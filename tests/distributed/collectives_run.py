"""How often processes talk to each other in an update; run by test_collectives.py under a launcher.

``python collectives_run.py FOLDER``: a toy with 42 tensors and 10 MB that train, two micro-steps an update. The calls
of each micro-step, by name, are written to ``FOLDER/<rank>.json``.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch
import toy_run
from torch import nn
from torch.profiler import ProfilerActivity, profile

from finetune.files import write_json

PLAIN = toy_run.Denoiser


class Wide(PLAIN):  # type: ignore[misc, valid-type]
    """The toy with a first layer of many."""

    def __init__(self, dropout: float) -> None:
        super().__init__(dropout)
        width = 362  # 20 x 362² x 4 bytes: 10 MB
        layers = [nn.Linear(16, width), *(nn.Linear(width, width) for _ in range(18)), nn.Linear(width, 8)]
        self.first = nn.Sequential(*layers)  # type: ignore[assignment]


def main(folder: Path) -> None:
    toy_run.Denoiser = Wide  # type: ignore[misc]
    recipe = toy_run.recipe(folder / "run", steps=5, gradient_accumulation_steps=2, learning_rate=1e-5, every=None)
    trainer, _ = toy_run.build(recipe, dropout=0.0)
    steps: list[dict[str, int]] = []
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for number, batch in enumerate(trainer.steps(toy_run.ToyBatches(recipe, trainer.processes))):
            with torch.profiler.record_function(f"micro-step {number}"):
                trainer.update(batch)
    events = seen.events() or []
    spans = {event.name: event.time_range for event in events if event.name.startswith("micro-step")}
    calls = [event for event in events if event.name.startswith("c10d::")]
    for number in range(len(spans)):
        span = spans[f"micro-step {number}"]
        steps.append(Counter(call.name for call in calls if span.start <= call.time_range.start < span.end))
    write_json(folder / f"{trainer.processes.rank}.json", steps)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
