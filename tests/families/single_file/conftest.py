"""A folder of each layout, a hub's cache, and no network."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import NoReturn

import pytest
from single_files import change

from finetune.families import flux, sd3, sdxl
from finetune.families.single_file.layouts import FLUX, SD1, SD2, SD3, SDXL
from finetune.tinyworld.tokenizer import build


@pytest.fixture(autouse=True)
def alone(own_cache: Path) -> None:
    """Nothing that another test has converted is there."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a file was looked for on the network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def twins(tiny_sd: Path, tiny_sd_v: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each layout; that of SD 2 has OpenCLIP's activation, by which it is known."""
    folder = tmp_path_factory.mktemp("twins")
    second = Path(shutil.copytree(tiny_sd_v, folder / "sd2"))
    change(second / "text_encoder" / "config.json", hidden_act="gelu")
    return {
        SD1.name: tiny_sd,
        SD2.name: second,
        SDXL.name: sdxl.tiny(folder / "sdxl"),
        SD3.name: sd3.tiny(folder / "sd3"),
        FLUX.name: flux.tiny(folder / "flux"),
    }


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with a CLIP's vocabulary in it, that of the embedded world."""
    folder = tmp_path / "hub" / "models--openai--clip-vit-large-patch14"
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    tokenizer = json.loads(build().backend_tokenizer.to_str())["model"]
    (snapshot / "vocab.json").write_text(json.dumps(tokenizer["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in tokenizer["merges"])
    (snapshot / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder.parent))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(folder.parent), raising=False)
    return snapshot
