"""A run in which something goes wrong at a chosen place; for test_failures.py and hang_hunt.py, under a launcher.

``python faulty_run.py OPTIONS.json``: ``recipe``, of the toy where its ``recipe`` is
"full", else of a model; ``faults``, each
``{"where", "count", "rank", "what", "seconds"}``: at the ``count``-th call of this kind (from 1) on this rank, ``what``
happens. The moment is written beside the output folder; ``joining`` is the timeout until the processes have met.
"""

from __future__ import annotations

import atexit
import datetime
import functools
import importlib
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import toy_run

from finetune import distributed, sampling
from finetune.config import Recipe
from finetune.config.command import exit_codes
from finetune.data.cache import Store, key
from finetune.data.drawing import ClassImages
from finetune.distributed import Processes, start
from finetune.errors import UserError
from finetune.train import Trainer, checkpoint

PLACES: dict[str, tuple[Any, str]] = {
    "start": (Processes, "__init__"),
    "barrier": (Processes, "barrier"),
    "cache": (Store, "_made"),
    "class image": (ClassImages, "_sample"),
    "engine": (Processes, "engine"),
    "step": (Trainer, "update"),
    "backward": (torch.Tensor, "backward"),
    "save": (checkpoint, "save"),
    "preview": (sampling, "one"),
    "finish": (Trainer, "finish"),
}
RANK = int(os.environ.get("RANK", "0"))


def happen(what: str, seconds: float) -> None:
    match what:
        case "raise":
            raise RuntimeError("out of coffee")
        case "missing":
            raise UserError("pictures/7.png: there is no such file")
        case "slow":
            time.sleep(seconds)
        case "exit":
            os._exit(7)
        case "freeze":  # as a machine does, launcher and all
            os.kill(os.getppid(), signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
        case "twice":  # a second signal while the first is being obeyed
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
        case _:
            os.kill(os.getpid(), getattr(signal, f"SIG{what.upper()}"))


def prepare_faults(faults: list[dict[str, Any]], marker: Path) -> None:
    """Put them into the functions in which they happen."""
    calls: Counter[str] = Counter()

    def faulty(where: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def called(*args: Any, **kwargs: Any) -> Any:
            calls[where] += 1
            for fault in faults:
                if (fault["where"], fault.get("count", 1), fault["rank"]) == (where, calls[where], RANK):
                    marker.write_text(f"{time.time()}")
                    happen(fault["what"], fault.get("seconds", 0))
            return plain(*args, **kwargs)

        return called

    atexit.register(lambda: [print(f"{where}: {count} calls", flush=True) for where, count in calls.items()])
    for where, (owner, name) in PLACES.items():
        setattr(owner, name, faulty(where, getattr(owner, name)))


def main(path: Path) -> None:
    options = json.loads(path.read_text())
    recipe = Recipe.model_validate_json(json.dumps(options["recipe"]))
    if "joining" in options:
        distributed.JOINING = datetime.timedelta(seconds=options["joining"])
    prepare_faults(options.get("faults", []), Path(f"{recipe.output}.fault"))
    if recipe.recipe != "full":
        importlib.import_module(f"recipes.{recipe.recipe}").main(recipe)
        return
    entries = {key("toy", number=number): (lambda: {"x": torch.ones(4)}) for number in range(6)}
    Store(Path(f"{recipe.output}.cache")).fill(entries, start(recipe.train), "Encoding")
    toy_run.main(path)


if __name__ == "__main__":
    with exit_codes():
        main(Path(sys.argv[1]))
