"""Run several recipes one after the other in the same processes and write down what each saw; for test_profiles.py.

``python matrix_run.py CELLS.json``: ``{name: recipe}``. Beside each run's output folder comes ``<name>.<rank>.json``
with the step of every forward pass, in how many sizes its pictures are, their ids and draws.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from finetune.batch import Batch
from finetune.config import Recipe
from finetune.config.command import exit_codes
from finetune.train import Trainer

seen: list[list[Any]] = []
plain = Trainer.update


def noting(trainer: Trainer, batch: Batch) -> Any:
    sizes = len(set(batch.sizes)) if batch.sizes else 1
    seen.append([trainer.step, sizes, *zip(batch.ids, batch.draws, strict=True)])
    return plain(trainer, batch)


def main(cells: Path) -> None:
    Trainer.update = noting  # type: ignore[method-assign]
    for name, values in json.loads(cells.read_text()).items():
        print(f"cell {name}", flush=True)
        seen.clear()
        recipe = Recipe.model_validate_json(json.dumps(values))
        importlib.import_module(f"recipes.{recipe.recipe}").main(recipe)
        rank = os.environ.get("RANK", "0")
        Path(f"{recipe.output}.{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    with exit_codes():
        main(Path(sys.argv[1]))
