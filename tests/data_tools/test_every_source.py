"""Plan, doctor, its page and the sheet look at tars, tables, streams and URLs as they do at folders."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from rich.console import Console

from data_tools import sheet
from data_tools.doctor import diagnose
from data_tools.doctor_page import page
from finetune.config import read_recipe
from finetune.plan import plan, render


@pytest.fixture
def pictures() -> dict[str, bytes]:
    """Four of noise, the first and last the same."""
    rng = np.random.default_rng(0)
    found = {}
    for number in range(3):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (24, 48, 3), dtype=np.uint8)).save(buffer, "PNG")
        found[f"{number}.png"] = buffer.getvalue()
    return {**found, "3.png": found["0.png"]}


def source(kind: str, pictures: dict[str, bytes], folder: Path) -> dict[str, Any]:
    if kind == "url":
        for name, content in pictures.items():
            fsspec.filesystem("memory").pipe(f"/{folder.name}/{name}", content)
        return {"folder": f"memory://{folder.name}"}
    if kind == "shards":
        with tarfile.open(folder / "0.tar", "w") as tar:
            for name, content in pictures.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        return {"shards": str(folder / "0.tar")}
    rows = [{"image": {"bytes": content, "path": None}} for content in pictures.values()]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    named = {"path": str(folder / "a.parquet"), "text": None}
    return {"dataset": named | ({"streaming": True, "limit": 9} if kind == "stream" else {})}


def recipe(folder: Path, model: Path, concept: dict[str, Any]) -> Path:
    own = {"prompt": "a zib star", "class_prompt": "a star", "trigger": "zib"}
    tree = {
        "recipe": "dreambooth",
        "output": str(folder / "run"),
        "model": {"path": str(model)},
        "adapter": {"kind": "lora", "rank": 2},
        "data": {"resolution": 16, "concepts": [own | concept], "cache": {"folder": str(folder / "cache")}},
        "train": {"batch_size": 2, "threads": 1},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["url", "shards", "table", "stream"])
def test_all_that_looks_at_pictures_looks_at_every_source(
    kind: str, pictures: dict[str, bytes], tmp_path: Path, tiny_sd: Path
) -> None:
    concept = source(kind, pictures, tmp_path)
    path = recipe(tmp_path, tiny_sd, concept)
    found = diagnose(path)
    assert found.at("refused") == [] and len(found.pictures) == 4
    (same,) = [finding for finding in found.findings if finding.kind == "copies"]
    assert same.pictures == tuple(list(found.pictures)[place] for place in (0, 3))
    assert page(found).count("<img") >= 4
    shown = sheet.draws(read_recipe(path), 8)
    assert len(shown) == 8 and {one.caption for one in shown} == {"a zib star"}
    whole = plan(read_recipe(path))
    (planned,) = whole.concepts
    assert planned.pictures == 4 and planned.bytes == sum(map(len, pictures.values()))
    said = io.StringIO()
    render(whole, Console(file=said, width=400))
    assert f"{planned.source}: 4 pictures" in said.getvalue()


def test_a_broken_picture_is_refused_by_its_place(pictures: dict[str, bytes], tmp_path: Path, tiny_sd: Path) -> None:
    broken = {**pictures, "2.png": pictures["2.png"][:100]}
    (refused,) = diagnose(recipe(tmp_path, tiny_sd, source("shards", broken, tmp_path))).at("refused")
    assert refused.text.startswith(f"{tmp_path}/0.tar:2.png: is broken or cut short")
    (refused,) = diagnose(recipe(tmp_path, tiny_sd, source("table", broken, tmp_path))).at("refused")
    assert refused.text.startswith(f"{tmp_path}/a.parquet: row 2: is broken or cut short")
