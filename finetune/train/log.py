"""What a run says of itself: ``metrics.jsonl``, tensorboard, and a bar or plain lines on the screen."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from finetune.distributed import Processes
from finetune.files import write_text
from finetune.train.run import RunFolder

_PLAIN_LINES = 20  # per run, where the screen is no terminal


class Log:
    """Writes on the main process; on the others every call does nothing.

    Args:
        step: updates done so far. Lines about later ones, of a run that was interrupted, are cut off.
        steps: updates of the whole run.
    """

    def __init__(self, folder: RunFolder, processes: Processes, step: int, steps: int) -> None:
        self._processes, self._step, self._steps = processes, step, steps
        self._began, self._first = time.perf_counter(), step
        self._bar: Progress | None = None
        if not processes.is_main:
            return
        from torch.utils.tensorboard import SummaryWriter

        _cut(folder.metrics, step)
        self._file = folder.metrics.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder.tensorboard), purge_step=step + 1)
        if sys.stdout.isatty():
            self._bar = _bar()
            self._task: TaskID = self._bar.add_task("training", total=steps, completed=step, loss="", speed="")

    def __enter__(self) -> Log:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._processes.is_main:
            return
        if self._bar:
            self._bar.stop()
        self._file.close()
        self._board.close()

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """One update's numbers: a line, flushed, of ``metrics.jsonl`` and a point of each curve."""
        if not self._processes.is_main:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._show(step, values)

    def pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        """Pictures, by name, for tensorboard."""
        if not self._processes.is_main:
            return
        import numpy as np

        for name, picture in pictures.items():
            self._board.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._processes.say(text)

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        loss, speed = values["loss"], values["samples_per_second"]
        if self._bar:
            self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", speed=f"{speed:.1f}")
        elif step % max(1, self._steps // _PLAIN_LINES) == 0 or step in (self._first + 1, self._steps):
            pace = (time.perf_counter() - self._began) / (step - self._first)
            left = _duration(pace * (self._steps - step))
            print(f"step {step}/{self._steps}  loss {loss:.4f}  {speed:.1f} pictures/s  {left} left", flush=True)


def peak_memory(device: torch.device) -> int:
    """The most memory this process has held so far, in bytes: on the GPU where it trains on one, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cut(metrics: Path, step: int) -> None:
    """Keep lines up to ``step``; a line that was being written when the run ended goes too."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            number: Any = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if number <= step:
            kept.append(line + "\n")
    write_text(metrics, "".join(kept))


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]} pictures/s"),
        TimeRemainingColumn(),
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
