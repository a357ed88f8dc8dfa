"""Whatever a set of pictures is packed in, a run sees the same pictures with the same captions in the same order."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from packed import contents, table, tar
from taken_batches import steps

from finetune.config.schema import DataConfig, Recipe
from finetune.data import Batches, prepare, scan

PROMPTED = {"class_prompt": "a star"}


def as_shard(folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {"shards": str(tar(tmp_path / "all.tar", contents(folder)))}


def as_two_shards(folder: Path, tmp_path: Path) -> dict[str, Any]:
    parts = contents(folder)
    tar(tmp_path / "a" / "00.tar", [(f"./{name}", content) for name, content in reversed(parts[:6])])
    tar(tmp_path / "a" / "01.tar", parts[6:])
    return {"shards": str(tmp_path / "a" / "{00..01}.tar")}


def as_url(folder: Path, tmp_path: Path) -> dict[str, Any]:
    for name, content in contents(folder):
        fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/{name}", content)
    return {"folder": f"memory://{tmp_path.name}"}


def as_remote_shards(folder: Path, tmp_path: Path) -> dict[str, Any]:
    path = tar(tmp_path / "all.tar", contents(folder))
    fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/all.tar", path.read_bytes())
    return {"shards": f"memory://{tmp_path.name}/*.tar"}


def as_parquet(folder: Path, tmp_path: Path) -> dict[str, Any]:
    whole = table(folder)
    whole.select(range(2)).to_parquet(str(tmp_path / "0.parquet"))
    whole.select(range(2, 5)).to_parquet(str(tmp_path / "1.parquet"))
    return {"dataset": {"path": str(tmp_path / "*.parquet")}}


def as_saved(folder: Path, tmp_path: Path) -> dict[str, Any]:
    table(folder).save_to_disk(str(tmp_path / "saved"))
    return {"dataset": {"path": str(tmp_path / "saved")}}


def as_image_folder(folder: Path, tmp_path: Path) -> dict[str, Any]:
    """A folder that ``datasets`` itself reads: the pictures are files beside the table."""
    (tmp_path / "plain").mkdir()
    lines = ["file_name,text"]
    for name, content in contents(folder):
        if name.endswith(".png"):
            (tmp_path / "plain" / name).write_bytes(content)
            lines.append(f"{name},{(folder / name).with_suffix('.txt').read_text().strip()}")
    (tmp_path / "plain" / "metadata.csv").write_text("\n".join(lines))
    return {"dataset": {"path": str(tmp_path / "plain")}}


def as_stream(folder: Path, tmp_path: Path) -> dict[str, Any]:
    named = as_parquet(folder, tmp_path)["dataset"]
    return {"dataset": {**named, "streaming": True, "limit": 100}}


PACKED = [
    as_shard,
    as_two_shards,
    as_url,
    as_remote_shards,
    as_parquet,
    as_saved,
    as_image_folder,
    as_stream,
]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("asks the network")

    monkeypatch.setattr("socket.socket.connect", refused)
    monkeypatch.setattr("socket.getaddrinfo", refused)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("pack", PACKED)
def test_every_source_gives_the_batches_of_the_folder(
    pack: Callable[[Path, Path], dict[str, Any]],
    folder: Callable[..., Path],
    make_recipe: Callable[..., Recipe],
    fake: Any,
    tmp_path: Path,
) -> None:
    path = folder(5)
    (tmp_path / "packed").mkdir()
    cache = {"latents": False, "text": False}
    first = prepare(make_recipe(path, data={"cache": dict(cache)}), fake())
    source = {**PROMPTED, **pack(path, tmp_path / "packed")}
    packed = prepare(make_recipe(data={"cache": dict(cache), "concepts": [source]}), fake())
    assert hashes(packed) == hashes(first)
    for one, other in zip(steps(first, 0, 12), steps(packed, 0, 12), strict=True):
        for left, right in zip(one, other, strict=True):
            assert left.captions == right.captions
            assert left.captions == tuple(f"a photo of zib number {number}" for number in shown(left))
            assert torch.equal(left.posterior.mean, right.posterior.mean)
    for picture in packed.pictures:
        again = pickle.loads(pickle.dumps(picture))
        assert again == picture and hash(again) == hash(picture)
        assert again.path.read_bytes() == picture.path.read_bytes()


def hashes(batches: Batches) -> list[str]:
    return list(batches.hashes.values())


def shown(batch: Any) -> list[int]:
    """The indexes that the pictures of a batch tell by their red."""
    return [round((float(mean[0].mean()) + 1) * 127.5 / 20) for mean in batch.posterior.mean]


@pytest.mark.parametrize(
    ("pack", "ids"),
    [
        (as_two_shards, ["0/00.tar/0.png", "0/00.tar/1.png", "0/00.tar/2.png", "0/01.tar/3.png", "0/01.tar/4.png"]),
        (as_remote_shards, [f"0/all.tar/{number}.png" for number in range(5)]),
        (as_url, [f"0/{number}.png" for number in range(5)]),
        (as_parquet, [f"0/{number}" for number in range(5)]),
        (as_stream, [f"0/{number}" for number in range(5)]),
    ],
)
def test_ids_name_the_place_within_the_source_and_not_where_it_lies(
    pack: Callable[[Path, Path], dict[str, Any]],
    ids: list[str],
    folder: Callable[..., Path],
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
) -> None:
    (tmp_path / "packed").mkdir()
    recipe = make_recipe(data={"concepts": [{**PROMPTED, **pack(folder(5), tmp_path / "packed")}]})
    assert [picture.id for picture in scan(recipe.data)[0].pictures] == ids


def test_no_source_that_is_there_loads_torch(folder: Callable[..., Path], tmp_path: Path) -> None:
    path = folder(5)
    (tmp_path / "packed").mkdir()
    concepts = [PROMPTED | pack(path, tmp_path / "packed") for pack in (as_shard, as_stream, as_saved)]
    concepts.append({"folder": f"file://{path}"})
    data = {"concepts": concepts, "cache": {"folder": str(tmp_path / "cache")}}
    scan(DataConfig.model_validate(data))  # fetches the stream, for which datasets itself loads torch
    code = (
        "import sys; from finetune.data import scan; from finetune.config.schema import DataConfig\n"
        f"found = scan(DataConfig.model_validate({data!r}))\n"
        "assert [len(concept.pictures) for concept in found] == [5] * 4\n"
        "loaded = {'torch', 'diffusers', 'transformers'} & set(sys.modules); assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
