"""Memory per process and bytes sent in a step, by formula and measured, under every way to launch.

    python tests/benchmarks/scaling.py [LAUNCH ...]

Every launch trains the recipes below for three steps on two processes of the CPU. Of the last step is written down what
each process holds, by storages of tensors, and what it gives to each collective. Prints the table of docs/scaling.md.
``zero3-near`` is zero3 with a model that is large as against what it keeps and gathers ahead.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from launching import PROFILES, ROOT, launch

from finetune.plan.held import held
from finetune.plan.launches import Launch, read
from finetune.plan.traffic import Passes, traffic
from finetune.plan.weights import Weight

LAUNCHES = ("cpu-2", "zero1", "zero2", "zero3", "zero3-near", "fsdp2")
RUN = ROOT / "tests" / "distributed" / "scaling_run.py"
RECIPES: dict[str, dict[str, Any]] = {
    "full": {"recipe": "full", "adapter": {"kind": "full"}},
    "lora": {"adapter": {"kind": "lora", "rank": 16}},
    "full, checkpointed, 2 micro-steps": {
        "recipe": "full",
        "adapter": {"kind": "full"},
        "train": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    },
}
ADAM = 8  # bytes that it remembers of a weight
WORLD = 2
PARTS = ("frozen", "trained", "copies", "gradients", "optimizer")
WAYS = ("all_reduce", "all_gather", "reduce_scatter")


@dataclass(frozen=True)
class Row:
    """A part of what is held or sent: bytes by formula, and measured on the process that has the most."""

    launch: str
    recipe: str
    part: str
    formula: int
    measured: int


def write_model(folder: Path) -> None:
    """A Stable Diffusion of some ten million weights, random, and three pictures."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from PIL import Image

    from finetune.families.tiny import autoencoder, clip_text, ddim, drawn
    from finetune.tinyworld.tokenizer import build

    (folder / "pictures").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (32, 32), (80 * number, 90, 20)).save(folder / "pictures" / f"{number}.png")
    with drawn(0):
        StableDiffusionPipeline(
            vae=autoencoder(4),
            text_encoder=clip_text(hidden_size=64, intermediate_size=256, num_hidden_layers=2),
            tokenizer=build(),
            unet=UNet2DConditionModel(
                sample_size=16,
                norm_num_groups=32,
                attention_head_dim=4,
                block_out_channels=(64, 128, 256),
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=64,
            ),
            scheduler=ddim(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder / "model")


def recipes(folder: Path, output: Path) -> dict[str, Any]:
    """Of ``RECIPES``, whole."""
    train = {"steps": 3, "threads": 1, "device": "auto", "batch_size": 1}
    concept = {"folder": str(folder / "pictures"), "prompt": "a red star"}
    data = {"resolution": 32, "concepts": [concept], "cache": {"folder": str(folder / "cache")}}
    common = {"recipe": "lora", "model": {"path": str(folder / "model")}, "data": data, "report": {"enabled": False}}
    return {
        name: {**common, **own, "output": str(output / name), "train": {**train, **own.get("train", {})}}
        for name, own in RECIPES.items()
    }


def settings(name: str, folder: Path) -> Path:
    """The file of a way to launch; of ``zero3-near`` a copy of zero3's in ``folder``."""
    if name != "zero3-near":
        return PROFILES / f"{name}.yaml"
    told = json.loads((ROOT / "launch" / "deepspeed" / "zero3.json").read_text())
    told["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 1000,
        "stage3_max_reuse_distance": 2_000_000,
        "stage3_max_live_parameters": 2_000_000,
        "stage3_prefetch_bucket_size": 500_000,
    }
    (folder / f"{name}.json").write_text(json.dumps(told))
    text = (PROFILES / "zero3.yaml").read_text().replace("launch/deepspeed/zero3.json", str(folder / f"{name}.json"))
    (folder / f"{name}.yaml").write_text(text)
    return folder / f"{name}.yaml"


def measured(name: str, folder: Path) -> list[Row]:
    """Launch all recipes and compare. ``folder`` has the model.

    Raises:
        RuntimeError: the processes have failed.
    """
    output = folder / name
    output.mkdir()
    cells = recipes(folder, output)
    (output / "cells.json").write_text(json.dumps(cells))
    file = settings(name, folder)
    code, said = launch(["--config_file", str(file)], RUN, str(output / "cells.json"))
    if code:
        raise RuntimeError(said)
    return [row for recipe, cell in cells.items() for row in _compared(name, read(file), recipe, cell, output)]


def _compared(name: str, used: Launch, recipe: str, cell: dict[str, Any], output: Path) -> Iterator[Row]:
    ranks = [json.loads((output / f"{recipe}.{rank}.json").read_text()) for rank in range(WORLD)]
    weights = [Weight(**{**one, "shape": tuple(one["shape"])}) for one in ranks[0]["weights"]]
    passes = Passes(accumulation=cell["train"].get("gradient_accumulation_steps", 1))
    states = ADAM * sum(one.numbers for one in weights if one.group is not None)
    ours = held(weights, used, WORLD, states, passes.accumulation)
    for part in PARTS:
        yield Row(name, recipe, part, ours.all(part), max(told["held"].get(part, 0) for told in ranks))
    sent: Counter[str] = Counter()
    for way, size in ranks[0]["sent"]:
        sent[way] += size
    for way, size in asdict(traffic(weights, used, WORLD, passes)).items():
        yield Row(name, recipe, way, size, sent[way])


def table(rows: Sequence[Row]) -> str:
    """In Markdown, MB: measured, and the formula's where these are not the same."""
    lines = [f"| launch | recipe | {' | '.join((*PARTS, *WAYS)).replace('_', '-')} |", "| --- " * 10 + "|"]
    cells: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        ours, theirs = (f"{size / 1e6:.2f}" for size in (row.formula, row.measured))
        cells.setdefault((row.launch, row.recipe), []).append(theirs if ours == theirs else f"{theirs} ({ours})")
    return "\n".join([*lines, *(f"| {' | '.join((*where, *sizes))} |" for where, sizes in cells.items())])


def main(names: Sequence[str]) -> None:
    """Print the table."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "accelerate", "deepspeed", "diffusers"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, {libraries}, gloo, 2 processes; MB\n")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        print(table([row for name in names or LAUNCHES for row in measured(name, Path(folder))]))


if __name__ == "__main__":
    main(sys.argv[1:])
