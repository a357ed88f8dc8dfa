"""Every launch profile on two real processes of the CPU: each method trains as on one, and runs move between them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import PROFILES, ROOT, TOY, alone, launch, profile, toy
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

MATRIX, ENGINE = (Path(__file__).with_name(name) for name in ("matrix_run.py", "engine_run.py"))
WORDS = {"kind": "embedding", "tokens": [{"token": "<zib>", "initializer": "star", "vectors": 2}]}
LORA = {"kind": "lora", "rank": 2}
IMAGES = {"kind": "images", "count": 3, "sampler": {"steps": 1}}
PIVOTAL = {"kind": "pivotal", "embedding": WORDS}
LAYERS = {"kind": "full", "select": "cross-kv", "detach_start": True}
METHODS: Mapping[str, dict[str, Any]] = {
    "lora": {
        "recipe": "dreambooth",
        "adapter": {**LORA, "targets": "wide", "text_encoder": True, "max_norm": 0.01},
        "prior": IMAGES,
        "ema": {"decay": 0.9},
        "samples": {"every": 2, "sampler": {"steps": 1}, "prompts": ["a zib star"]},
    },
    "pivotal": {"recipe": "pivotal", "adapter": {**PIVOTAL, "weights": LORA}},
    "words": {
        "recipe": "textual_inversion",
        "adapter": {**WORDS, "norm": {"kind": "decay"}, "regularisation": 0.1},
    },
    "hypernetwork": {"recipe": "hypernetwork", "adapter": {"kind": "hypernetwork"}},
    "full": {"recipe": "dreambooth", "adapter": {"kind": "full", "text_encoder": True}, "prior": IMAGES},
    "custom diffusion": {"recipe": "custom_diffusion", "adapter": {**PIVOTAL, "weights": LAYERS}},
    "model prior": {"recipe": "dreambooth", "adapter": {**LORA, "use_dora": True}, "prior": {"kind": "model"}},
    "shapes": {"adapter": LORA},
    "lokr": {"adapter": {"kind": "lokr", "rank": 2}},
    "loha": {"adapter": {"kind": "loha", "rank": 2}},
    "oft": {"adapter": {"kind": "oft", "block_size": 4}},
}
FEW = ("lora", "pivotal")
CELLS = [
    pytest.param("zero2", FEW),
    *(pytest.param(name, tuple(METHODS), marks=pytest.mark.slow) for name in ("cpu-2", "zero1", "zero2", "zero3", "fsdp2")),
    *(pytest.param(name, (*FEW, "full"), marks=pytest.mark.slow) for name in ("zero2-offload", "zero3-offload", "fsdp2-offload")),
]
ENGINES = {
    "cpu-2": "DDP",
    "zero1": "DeepSpeed ZeRO-1",
    "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3",
    "zero2-offload": "DeepSpeed ZeRO-2",
    "zero3-offload": "DeepSpeed ZeRO-3",
    "fsdp2": "FSDP2",
    "fsdp2-offload": "FSDP2",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``subject``, three squares, and ``shapes``, of three proportions."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, sizes in (("subject", [(24, 24)] * 3), ("shapes", [(48, 16), (16, 48), (32, 32)])):
        (folder / name).mkdir()
        for number, size in enumerate(sizes):
            picture = Image.new("RGB", size, (40, 60 * number, 90))
            ImageDraw.Draw(picture).ellipse((3 + number, 4, 15 + number, 18), fill=(230, 200, 30))
            picture.save(folder / name / f"{number}.png")
    return folder


class Setting:
    """Recipes of a few steps whose global batch is four pictures."""

    def __init__(self, folder: Path, model: Path, pictures: Path) -> None:
        self.folder, self.model, self.pictures = folder, model, pictures

    def recipe(self, method: str, output: Path, batch_size: int, steps: int = 4) -> dict[str, Any]:
        """Adam divides by what is nearly nothing where a gradient is zero but for rounding, as a key's bias has it:
        ``eps`` is large enough to hide that.
        """
        sections = dict(METHODS[method])
        word = "<zib>" if sections["adapter"]["kind"] in ("embedding", "pivotal") else "zib"
        shapes = method == "shapes"
        concept = {
            "folder": str(self.pictures / ("shapes" if shapes else "subject")),
            "prompt": f"a photo of {word} star",
            "class_prompt": "a photo of a star",
            "trigger": word,
        }
        data = {"resolution": 16, "concepts": [concept], "cache": {"folder": str(self.folder / "cache")}}
        train = {
            "steps": steps,
            "batch_size": batch_size * (2 if shapes else 1),
            "gradient_accumulation_steps": 1 if shapes else 2,
            "learning_rate": 1e-3,
            "optimizer": {"name": "adamw", "eps": 1e-4},
            "max_grad_norm": 0.05,
            "threads": 1,
            "ema": sections.pop("ema", None),
        }
        return {
            "recipe": "lora",
            "output": str(output),
            "seed": 3,
            "model": {"path": str(self.model)},
            "data": {**data, "buckets": {"step": 8} if shapes else None},
            "train": train,
            "report": {"enabled": False},
            **sections,
        }

    def write(self, name: str, methods: tuple[str, ...], batch_size: int, steps: int = 4) -> str:
        """A file of cells whose runs lie in the folder ``name``."""
        cells = {method: self.recipe(method, self.folder / name / method, batch_size, steps) for method in methods}
        path = self.folder / f"{name}-{steps}.json"
        path.write_text(json.dumps(cells))
        return str(path)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Path, pictures: Path) -> Setting:
    return Setting(tmp_path_factory.mktemp("runs"), tiny_sd, pictures)


def reference(setting: Setting, methods: tuple[str, ...]) -> Path:
    """Runs of one process; those that are there are taken as they are."""
    missing = tuple(method for method in methods if not (setting.folder / "one" / f"{method}.0.json").is_file())
    if missing:
        alone(MATRIX, setting.write("one", missing, 2))
    return setting.folder / "one"


def losses(output: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key.startswith(("loss", "learning", "step"))} for row in rows]


def passes(run: Path, ranks: int) -> list[list[Any]]:
    return [row for rank in range(ranks) for row in json.loads(run.with_name(f"{run.name}.{rank}.json").read_text())]


def drawn(rows: list[list[Any]]) -> list[tuple[Any, ...]]:
    """Step, id and draw of every sample."""
    return sorted((step, *sample) for step, _, *samples in rows for sample in samples)


def assert_same_run(one: Path, other: Path) -> None:
    """Equal losses, and equal files none of which has an empty tensor."""
    mine, theirs = losses(one), losses(other)
    assert len(mine) == len(theirs)
    for row, again in zip(mine, theirs, strict=True):
        assert row == pytest.approx(again, abs=1e-6)
    files = sorted(path.relative_to(one) for path in one.glob("adapters/**/*.safetensors"))
    assert files and files == sorted(path.relative_to(other) for path in other.glob("adapters/**/*.safetensors"))
    for path in files:
        ours, read = load_file(one / path), load_file(other / path)
        assert ours.keys() == read.keys()
        for name, value in ours.items():
            assert value.shape == read[name].shape and value.numel()
            torch.testing.assert_close(value, read[name], rtol=0, atol=1e-6, msg=f"{path}: {name}")


@pytest.mark.parametrize(("name", "methods"), CELLS)
def test_two_processes_train_every_method_as_one_does(
    name: str, methods: tuple[str, ...], setting: Setting, tmp_path: Path
) -> None:
    one, two = reference(setting, methods), setting.folder / name
    code, said = launch(profile(name, tmp_path), MATRIX, setting.write(name, methods, 1))
    assert code == 0, said
    assert said.count(f"2 processes ({ENGINES[name]}, gloo), cpu") == len(methods)
    for method in methods:
        assert_same_run(one / method, two / method)
        assert drawn(passes(one / method, 1)) == drawn(passes(two / method, 2))
    if "shapes" in methods:
        ranks = [json.loads((two / f"shapes.{rank}.json").read_text()) for rank in (0, 1)]
        sizes = [[row[1] for row in rows] for rows in ranks]
        assert sizes[0] != sizes[1], "or nothing was shown: both have run the denoiser equally often by chance"
    shutil.rmtree(two)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_a_run_goes_from_one_process_to_two_and_back(name: str, setting: Setting, tmp_path: Path) -> None:
    moved = f"moved-{name}"
    for steps, two in ((2, False), (3, True), (4, False)):
        cells = setting.write(moved, FEW, 1 if two else 2, steps)
        if two:
            code, said = launch(profile(name, tmp_path), MATRIX, cells)
            assert code == 0, said
        else:
            alone(MATRIX, cells)
    for method in ("lora",):  # a pivot is a share of the run's steps
        assert_same_run(reference(setting, FEW) / method, setting.folder / moved / method)


def stop_at(step: int, path: Path, output: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(TOY), toy(path, output, {"signal_at": [step, 0]}, batch_size=4)], capture_output=True
    )
    assert done.returncode == 3, done.stderr


def toys_equal(one: Path, other: Path) -> None:
    """The toy's parts of the loss are sums over what one process sees: its whole loss is what can be compared."""
    first, second = ([row["loss"] for row in losses(path)] for path in (one, other))
    assert first == pytest.approx(second, abs=1e-6)
    ours, theirs = (load_file(path / "adapters" / "toy.safetensors") for path in (one, other))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["zero3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cpu-2", "zero1", "zero2", "zero3-offload"))],
)
def test_what_an_engine_must_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards, averages, written weights and values cut; and a run that moves from one process to two and back."""
    monkeypatch.setenv("PYTHONPATH", f"{TOY.parent}:{ROOT}")
    one, moved, uneven = (tmp_path / run for run in ("one", "moved", "uneven"))
    stop_at(2, tmp_path / "t.json", moved)
    alone(TOY, toy(tmp_path / "t.json", uneven, {"every": 2}, steps=2, batch_size=4, ema=None))
    tamper(next((uneven / "checkpoints").iterdir()))
    code, said = launch(profile(name, tmp_path), ENGINE, str(tmp_path))
    assert code == 0, said
    assert said.count("is content") == 2
    for output in (one, moved):
        alone(TOY, toy(tmp_path / "t.json", output, batch_size=4))
    toys_equal(moved, one)
    settings = {"max_grad_value": 0.01, "optimizer": {"name": "lion"}, "learning_rate": 0.01, "ema": None}
    alone(TOY, toy(tmp_path / "t.json", tmp_path / "cut", steps=6, batch_size=4, **settings))
    values = json.loads((tmp_path / "values.json").read_text())
    for weight, value in load_file(tmp_path / "cut" / "adapters" / "toy.safetensors").items():
        torch.testing.assert_close(torch.tensor(values[weight]), value, rtol=0, atol=1e-5)


def tamper(checkpoint: Path) -> None:
    """Let one weight have been moved less often than the others."""
    from finetune.files import sha256, write_json

    path = checkpoint / "optimizer.safetensors"
    memory = load_file(path)
    memory["denoiser.first.bias/step"] -= 1
    save_file(memory, path)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    write_json(checkpoint / "manifest.json", {**manifest, path.name: sha256(path)})


@pytest.mark.slow
def test_a_run_goes_from_profile_to_profile(tmp_path: Path) -> None:
    """Each takes two steps: the others learn of a signal to one process in the step after."""
    one, moved, profiles = tmp_path / "one", tmp_path / "moved", ("cpu-2", "zero1", "zero3", "zero2", "cpu-2", "zero3")
    steps = 2 * len(profiles) + 2
    for step, name in zip(range(2, steps, 2), profiles, strict=True):
        options = toy(tmp_path / "m.json", moved, {"signal_at": [step - 1, 1]}, batch_size=2, steps=steps)
        code, said = launch(profile(name, tmp_path), TOY, options)
        assert code != 0 and f"stopped after step {step}" in said, said
    for output in (one, moved):
        alone(TOY, toy(tmp_path / "o.json", output, batch_size=4, steps=steps))
    toys_equal(moved, one)


@pytest.mark.parametrize("name", ["cpu-2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_process_that_fails_ends_all_with_its_traceback(name: str, tmp_path: Path) -> None:
    options = toy(tmp_path / "o.json", tmp_path / "run", {"raise_at": [2, 1]}, batch_size=2)
    code, said = launch(profile(name, tmp_path), TOY, options, timeout=60)
    assert code != 0 and "RuntimeError: out of coffee" in said and "Traceback" in said


def test_every_profile_is_one_that_accelerate_and_deepspeed_read() -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    found = sorted(PROFILES.glob("*.yaml"))
    assert {path.stem for path in found} >= {"cpu", "single", "ddp", "cpu-2", "zero1", "zero2", "zero3", "ddp-nodes"}
    for path in found:
        config = load_config_from_file(str(path))
        described = getattr(config, "deepspeed_config", None) or {}
        if described:
            settings = json.loads((ROOT / described["deepspeed_config_file"]).read_text())
            stage = DeepSpeedZeroConfig(**settings["zero_optimization"]).stage
            assert f"zero{int(stage)}" in path.stem and described["zero3_init_flag"] is False


@pytest.mark.slow
def test_two_machines_are_one_run(tmp_path: Path) -> None:
    """Two launchers that know each other's address, here both on this machine, of one process each."""
    one, two = tmp_path / "one", tmp_path / "two"
    options = toy(tmp_path / "two.json", two, batch_size=2)
    machines = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", "29517"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(PROFILES / "ddp-nodes.yaml")]
    started = [
        subprocess.Popen([*command, *machines, "--machine_rank", rank, str(TOY), options], stdout=subprocess.PIPE)
        for rank in ("1", "0")
    ]
    said = b"".join(process.communicate(timeout=300)[0] for process in started).decode()
    assert all(process.returncode == 0 for process in started)
    assert "2 processes (DDP, gloo), cpu" in said
    alone(TOY, toy(tmp_path / "one.json", one, batch_size=4))
    toys_equal(two, one)
