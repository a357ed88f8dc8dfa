"""Two real processes on the CPU share a folder, as a person starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_captioners import photographs
from typer.testing import CliRunner

from finetune.cli import app
from finetune.data.captions import read_metadata

ROOT = Path(__file__).parents[2]
PROFILE = ROOT / "launch" / "accelerate" / "cpu-2.yaml"


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two folders of the same six pictures, of which the first is broken and the third has a line of its own."""
    made = [tmp_path / name for name in ("one", "two")]
    for folder in made:
        folder.mkdir()
        for number, image in enumerate(photographs(6)):
            image.save(folder / f"{number}.png")
        (folder / "0.png").write_bytes(b"no picture")
        line = {"file_name": "2.png", "text": "by hand", "rating": 5}
        (folder / "metadata.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    return made


def test_two_processes_write_what_one_does(folders: list[Path], tiny_model: Callable[[str], Path]) -> None:
    """The broken picture ends the first of them with 2, and only once the second is done."""
    one, two = folders
    told = ["--model", str(tiny_model("blip")), "--out", "jsonl", "--max-new-tokens", "6", "--batch-size", "2"]
    alone = CliRunner().invoke(app, ["data", "caption", str(one), *told, "--device", "cpu"])
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(PROFILE), "--module"]
    done = subprocess.run(
        [sys.executable, *launcher, "finetune", "data", "caption", str(two), *told],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert alone.exit_code == 2 and done.returncode != 0
    assert "2 processes (DDP, gloo), cpu" in done.stderr, done.stderr
    for said in (alone.stdout, done.stdout):
        assert said.count("0.png: is not a picture") == 1 and "4 captions written, 1 were there" in said
    ours, theirs = (read_metadata(folder / "metadata.jsonl") for folder in folders)
    assert {name: row.captions for name, row in ours[0].items()} == {
        name: row.captions for name, row in theirs[0].items()
    }
    assert set(ours[0]) == {"1.png", "2.png", "3.png", "4.png", "5.png"} and not theirs[1]
    first = json.loads((two / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first == {"file_name": "2.png", "text": "by hand", "rating": 5}
    assert sorted(path.suffix for path in two.iterdir()) == sorted([".jsonl", *[".png"] * 6])
