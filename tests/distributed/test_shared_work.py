"""However work is divided, it is done once: class images, and the pictures and the learning rate of every step."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from launching import TOY, alone, launch, profile, together, toy
from PIL import Image

TOYS, FAULTY = (Path(__file__).with_name(name) for name in ("toys_run.py", "faulty_run.py"))
TOGETHER = 16  # pictures a step
SCHEDULE = {"name": "cosine_with_restarts", "warmup_steps": 3, "cycles": 2}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu-2", "zero2"])
def test_the_schedule_counts_updates_whatever_shares_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """World 1, 2 and 4 times accumulation 1, 2 and 4: the same rate in every update, to the last bit."""
    monkeypatch.setenv("PYTHONPATH", f"{TOY.parent}{os.pathsep}{os.environ.get('PYTHONPATH', TOY.parents[2])}")
    rates, losses = {}, {}
    for world in (1, 2, 4):
        paths = []
        for parts in (1, 2, 4):
            shared: dict[str, Any] = {"batch_size": TOGETHER // world // parts, "gradient_accumulation_steps": parts}
            run = tmp_path / f"{world}-{parts}"
            paths.append(toy(tmp_path / f"{run.name}.json", run, steps=12, schedule=SCHEDULE, **shared))
        if world == 1:
            alone(TOYS, *paths)
        else:
            code, said = together([*profile(name, tmp_path), "--num_processes", f"{world}"], TOYS, *paths)
            assert code == 0, said
        for parts in (1, 2, 4):
            lines = (tmp_path / f"{world}-{parts}" / "metrics.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            rates[world, parts] = [(row["step"], row["learning_rate_first"], row["learning_rate_last"]) for row in rows]
            losses[world, parts] = [row["loss"] for row in rows]
    assert len(rates[1, 1]) == 12 and len({rate for _, rate, _ in rates[1, 1]}) > 8
    assert all(found == rates[1, 1] for found in rates.values()), rates
    assert all(found == pytest.approx(losses[1, 1], abs=1e-6) for found in losses.values()), losses


def dreambooth(
    output: Path, model: Path, pictures: Path, cache: Path, world: int = 2, **sections: Any
) -> dict[str, Any]:
    """A recipe of four steps that draws class images and previews; four pictures a step."""
    concept = {
        "folder": str(pictures),
        "prompt": "a photo of zib star",
        "class_prompt": "a photo of a star",
        "trigger": "zib",
    }
    return {
        "recipe": "dreambooth",
        "output": str(output),
        "model": {"path": str(model)},
        "adapter": {"kind": "lora", "rank": 2},
        "data": {"resolution": 16, "concepts": [concept], "cache": {"folder": str(cache)}},
        "prior": {"kind": "images", "count": 7, "sampler": {"steps": 1}, "batch_size": 2},
        "samples": {"every": 2, "sampler": {"steps": 1}, "prompts": ["a zib star", "a star", "zib"]},
        "train": {"steps": 4, "batch_size": 4 // world, "learning_rate": 1e-3, "threads": 1},
        "report": {"enabled": False},
        **sections,
    }


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (24, 24), (50 * number, 90, 30)).save(folder / f"{number}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world"), [("cpu-2", 2), ("cpu-2", 4), ("zero3", 4)])
def test_class_images_and_previews_are_shared(
    name: str, world: int, tmp_path: Path, tiny_sd: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven class images by twos on two and four processes: each drawn once, the same files as of one process."""
    monkeypatch.setenv("PYTHONPATH", f"{TOY.parent}{os.pathsep}{os.environ.get('PYTHONPATH', TOY.parents[2])}")
    images: dict[int, dict[str, bytes]] = {}
    previews: dict[int, list[str]] = {}
    for ranks in (1, world):
        values = dreambooth(tmp_path / f"{ranks}", tiny_sd, pictures, tmp_path / f"cache{ranks}", ranks)
        path = tmp_path / f"{ranks}.json"
        path.write_text(json.dumps({"recipe": values}))
        if ranks == 1:
            alone(FAULTY, str(path))
        else:
            options = [*profile(name, tmp_path), "--num_processes", f"{ranks}"]
            code, said = together(options, FAULTY, str(path), timeout=300)
            assert code == 0, said
        drawn = (tmp_path / f"cache{ranks}").glob("class-images/*/*.png")
        images[ranks] = {file.name: file.read_bytes() for file in drawn}
        previews[ranks] = sorted(file.name for file in (tmp_path / f"{ranks}" / "samples").glob("*/*.png"))
    calls = [int(count) for count in re.findall(r"class image: (\d+) calls", said)]
    assert sum(calls) == 4 and max(calls) == 4 // min(world, 4), f"four pairs are shared evenly: {calls}"
    assert images[1] == images[world] and previews[1] == previews[world]
    assert len(images[1]) == 7 == len(set(images[1].values()))


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_a_port_that_is_in_use_is_said_at_once(machines: int, tmp_path: Path) -> None:
    """On one machine the run takes another one. Where others would look for it there, the start ends."""
    several = ["--num_machines", "2", "--num_processes", "2", "--machine_rank", "0", "--main_process_ip", "127.0.0.1"]
    name, options = ("cpu-2", []) if machines == 1 else ("ddp-nodes", several)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        options = [*profile(name, tmp_path), *options, "--main_process_port", f"{port}"]
        code, said = launch(options, TOY, toy(tmp_path / "o.json", tmp_path / "run", batch_size=2), timeout=60)
    assert (code == 0) == (machines == 1) and f"port `{port}`" in said.lower(), said
