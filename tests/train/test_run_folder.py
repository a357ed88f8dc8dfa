from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy_run import recipe

from finetune.config import read_recipe
from finetune.distributed import start
from finetune.errors import UserError
from finetune.files import PARTIAL
from finetune.train.log import Log
from finetune.train.run import RunFolder, open_run


def test_the_recipe_is_written_down_and_reads_back(tmp_path: Path) -> None:
    run = recipe(tmp_path / "run")
    folder = open_run(run, start(run.train))
    assert read_recipe(folder.lock) == run
    assert "# torch " in folder.lock.read_text()


def test_another_run_is_refused_by_its_keys(tmp_path: Path) -> None:
    run = recipe(tmp_path / "run")
    processes = start(run.train)
    before = open_run(run, processes).lock.read_bytes()
    other = run.model_copy(update={"seed": 1, "adapter": run.adapter.model_copy(update={"select": "attention"})})
    with pytest.raises(UserError, match=r"another run: adapter.select is 'all' there and 'attention' here, seed is 0"):
        open_run(other, processes)
    assert RunFolder(tmp_path / "run").lock.read_bytes() == before


def test_length_and_logging_may_change(tmp_path: Path) -> None:
    processes = start(recipe(tmp_path).train)
    open_run(recipe(tmp_path / "run", steps=5), processes)
    open_run(recipe(tmp_path / "run", steps=9, every=2, keep=3, threads=2), processes)
    assert read_recipe(tmp_path / "run" / "recipe.lock.yaml").train.steps == 9


def test_what_is_no_run_is_left_alone(tmp_path: Path) -> None:
    processes = start(recipe(tmp_path).train)
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no recipe.lock.yaml"):
        open_run(recipe(tmp_path / "other"), processes)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        open_run(recipe(tmp_path / "file"), processes)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_lock_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.lock.yaml").write_text("recipe: full\nstepz: 3\n")
    with pytest.raises(UserError, match="another version"):
        open_run(recipe(tmp_path / "run"), start(recipe(tmp_path).train))


def test_not_resuming_never_deletes(tmp_path: Path) -> None:
    processes = start(recipe(tmp_path).train)
    folder = open_run(recipe(tmp_path / "run", resume=False), processes)
    (folder.checkpoints / "step-000003").mkdir(parents=True)
    with pytest.raises(UserError, match=r"checkpoint.resume is false"):
        open_run(recipe(tmp_path / "run", resume=False), processes)
    assert (folder.checkpoints / "step-000003").is_dir()


def test_leftovers_of_interrupted_writers_are_removed(tmp_path: Path) -> None:
    processes = start(recipe(tmp_path).train)
    folder = open_run(recipe(tmp_path / "run"), processes)
    for place in (folder.path, folder.checkpoints, folder.samples, folder.adapters):
        place.mkdir(exist_ok=True)
        (place / f"{PARTIAL}1-x").write_text("half")
        (place / f"{PARTIAL}2-x").mkdir()
        (place / "kept").write_text("whole")
    open_run(recipe(tmp_path / "run"), processes)
    assert not list(folder.path.rglob(f"{PARTIAL}*"))
    assert len(list(folder.path.rglob("kept"))) == 4


def test_a_continued_log_has_every_step_once(tmp_path: Path) -> None:
    processes = start(recipe(tmp_path).train)
    folder = open_run(recipe(tmp_path / "run"), processes)
    values = {"loss": 1.0, "samples_per_second": 2.0}
    with Log(folder, processes, 0, 9) as log:
        for step in (1, 2, 3):
            log.record(step, values)
    with folder.metrics.open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    with Log(folder, processes, 2, 9) as log:
        log.record(3, {"loss": 9.0, "samples_per_second": 2.0})
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 9.0)]
