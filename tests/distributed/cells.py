"""Runs of every method on one process, and on several that must not differ from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import alone
from safetensors.torch import load_file

MATRIX = Path(__file__).with_name("matrix_run.py")
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
    "checkpointed": {
        "adapter": {**LORA, "text_encoder": True},
        "train": {"gradient_checkpointing": True},
    },
}
HALF = {"adapter": LORA, "model": {"dtype": "bfloat16"}, "train": {"mixed_precision": "bf16"}}


class Setting:
    """Recipes of a few steps whose global batch is four pictures."""

    def __init__(self, folder: Path, model: Path, pictures: Path) -> None:
        self.folder, self.model, self.pictures = folder, model, pictures

    def recipe(self, method: str, output: Path, world: int, steps: int = 4) -> dict[str, Any]:
        """One for ``world`` processes.

        Adam divides by what is nearly nothing where a gradient is zero but for rounding, as a key's bias has it:
        ``eps`` is large enough to hide that.
        """
        sections = dict(HALF if method == "half" else METHODS[method])
        word = "<zib>" if sections["adapter"]["kind"] in ("embedding", "pivotal") else "zib"
        shapes = method == "shapes"
        size, parts = {1: (2, 2), 2: (1, 2), 4: (1, 1)}[world]
        concept = {
            "folder": str(self.pictures / ("shapes" if shapes else "subject")),
            "prompt": f"a photo of {word} star",
            "class_prompt": "a photo of a star",
            "trigger": word,
        }
        data = {"resolution": 16, "concepts": [concept], "cache": {"folder": str(self.folder / "cache")}}
        train = {
            "steps": steps,
            "batch_size": size * parts if shapes else size,
            "gradient_accumulation_steps": 1 if shapes else parts,
            "learning_rate": 1e-3,
            "optimizer": {"name": "adamw", "eps": 1e-4},
            "max_grad_norm": 0.05,
            "threads": 1,
            "ema": sections.pop("ema", None),
            **sections.pop("train", {}),
        }
        return {
            "recipe": "lora",
            "output": str(output),
            "seed": 3,
            "model": {"path": str(self.model), **sections.pop("model", {})},
            "data": {**data, "buckets": {"step": 8} if shapes else None},
            "train": train,
            "report": {"enabled": False},
            **sections,
        }

    def write(self, name: str, methods: tuple[str, ...], world: int, steps: int = 4) -> str:
        """A file of cells for ``world`` processes, whose runs lie in the folder ``name``."""
        cells = {method: self.recipe(method, self.folder / name / method, world, steps) for method in methods}
        path = self.folder / f"{name}-{world}-{steps}.json"
        path.write_text(json.dumps(cells))
        return str(path)


def reference(setting: Setting, methods: tuple[str, ...]) -> Path:
    """Runs of one process; those that are there are taken as they are."""
    missing = tuple(method for method in methods if not (setting.folder / "one" / f"{method}.0.json").is_file())
    if missing:
        alone(MATRIX, setting.write("one", missing, 1))
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


def toys_equal(one: Path, other: Path) -> None:
    """The toy's parts of the loss are sums over what one process sees: its whole loss is what can be compared."""
    first, second = ([row["loss"] for row in losses(path)] for path in (one, other))
    assert first == pytest.approx(second, abs=1e-6)
    ours, theirs = (load_file(path / "adapters" / "toy.safetensors") for path in (one, other))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-5)
