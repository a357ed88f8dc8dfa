"""The other pages, the recipes that are shipped, and a page on two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.config import read_recipe
from recipes import dreambooth, full, lora

WriteRecipe = Callable[..., Path]
CONFIGS = sorted(Path("recipes/configs").glob("*.yaml"))
PAGES = {"lora": (lora, {"kind": "lora", "rank": 2}), "full": (full, {"kind": "full", "select": "cross-kv"})}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_name_their_page(config: Path) -> None:
    recipe = read_recipe(config)
    assert (Path("recipes") / f"{recipe.recipe}.py").is_file()
    assert Path(recipe.output).parts[0] == "runs"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_without_prior_trains_and_its_files_verify(name: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    page, adapter = PAGES[name]
    page.main(read_recipe(write_recipe(recipe=name, adapter=adapter, prior={"kind": "none"})))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert any((tmp_path / "run" / "adapters").iterdir())


@pytest.mark.parametrize("kind", ["pairwise", "mixed", "model"])
@pytest.mark.parametrize("name", PAGES)
def test_every_page_preserves_the_prior_that_its_recipe_asks_for(
    name: str, kind: str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """A page that took `prior` and left it out of its loss would train on class images as if they were the subject."""
    page, adapter = PAGES[name]
    sampler = {"steps": 1}
    prior = {"kind": "images", "count": 3, "layout": kind, "sampler": sampler} if kind != "model" else {"kind": kind}
    logged = {}
    for run, module in (("dreambooth", dreambooth), (name, page)):
        output = tmp_path / run
        module.main(read_recipe(write_recipe(recipe=run, adapter=adapter, prior=prior, output=str(output))))
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        logged[run] = [(row["loss"], row["loss_prior"], row["loss_instance"]) for row in rows]
    assert logged[name] == logged["dreambooth"]


def test_a_page_that_runs_another_s_can_be_started_as_a_script() -> None:
    command = [sys.executable, str(Path("recipes/pivotal.py").resolve()), "--config", "nowhere.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "nowhere.yaml" in done.stderr


@pytest.mark.slow
def test_two_processes_do_what_one_does(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    adapter = {"kind": "lora", "rank": 2}  # dropout differs between processes by design
    train = {"steps": 4, "learning_rate": 1e-2, "threads": 1}
    one = write_recipe("one.yaml", adapter=adapter, train={**train, "batch_size": 2}, output=str(tmp_path / "one"))
    two = write_recipe("two.yaml", adapter=adapter, train={**train, "batch_size": 1}, output=str(tmp_path / "two"))
    page = str(Path("recipes/dreambooth.py").resolve())
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu-2.yaml"]
    for command in ([sys.executable, page, "--config", str(one)], [*launcher, page, "--config", str(two)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes (DDP, gloo)" in done.stdout

    def losses(run: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]

    assert losses("two") == pytest.approx(losses("one"), rel=1e-5)
    file = Path("adapters/pytorch_lora_weights.safetensors")
    first, second = load_file(tmp_path / "one" / file), load_file(tmp_path / "two" / file)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
