"""Estimated against measured memory: five recipes on random models that are large enough to weigh.

    python tests/benchmarks/memory.py [NAME ...]

Every recipe runs three steps in a process of its own, on the CPU. Measured is what the process holds at the most within
these steps beyond what it held after the same recipe has run on a model that weighs nothing; estimated is what
``finetune plan`` says of a step, without its constant for libraries. Prints a line a recipe: name, estimated, measured,
their ratio.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

MODELS = ("sd", "sdxl")
RECIPES: dict[str, dict[str, Any]] = {
    "lora": {"train": {"batch_size": 2}},
    "lora-packed": {
        "model": {"path": "sdxl", "dtype": "bfloat16", "quantize": {"kind": "int8"}},
        "train": {"batch_size": 2, "gradient_checkpointing": True},
    },
    "full": {"recipe": "full", "adapter": {"kind": "full"}},
    "pissa": {
        "adapter": {"kind": "lora", "rank": 8, "init": "pissa", "text_encoder": True, "targets": "wide"},
        "train": {"gradient_accumulation_steps": 2},
    },
    "preserved": {
        "model": {"path": "sdxl"},
        "prior": {"kind": "model"},
        "train": {"mixed_precision": "bf16", "ema": {"decay": 0.9}},
    },
}


def recipe_of(name: str, folder: Path) -> Path:
    """Write a recipe, whose models and pictures lie in ``folder``."""
    own = RECIPES[name]
    whole = {
        "recipe": "lora",
        "output": str(folder / "runs" / name),
        "adapter": {"kind": "lora", "rank": 16},
        "data": {
            "resolution": 128,
            "concepts": [{"folder": str(folder / "pictures"), "prompt": "a red star", "class_prompt": "a star"}],
            "cache": {"folder": str(folder / "cache")},
        },
        "report": {"enabled": False},
        **own,
        "model": {**own.get("model", {}), "path": str(folder / own.get("model", {}).get("path", "sd"))},
        "train": {"steps": 3, "threads": 1, "device": "cpu", **own.get("train", {})},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(whole), encoding="utf-8")
    return path


def write_models(folder: Path) -> None:
    """Twins of some ten million parameters, with two pixels a latent cell, and three pictures."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from PIL import Image
    from transformers import CLIPTextModelWithProjection

    from finetune.families.tiny import autoencoder, clip_text, ddim, drawn, write_tiny_sd
    from finetune.tinyworld.tokenizer import build

    write_tiny_sd(folder / "warm")
    (folder / "pictures").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (128, 128), (80 * number, 90, 20)).save(folder / "pictures" / f"{number}.png")
    text: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    common: dict[str, Any] = {"sample_size": 64, "norm_num_groups": 32, "attention_head_dim": 4}
    with drawn(0):
        StableDiffusionPipeline(
            vae=autoencoder(4),
            text_encoder=clip_text(**text),
            tokenizer=build(),
            unet=UNet2DConditionModel(
                **common,
                block_out_channels=(96, 192, 384),
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=128,
            ),
            scheduler=ddim(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder / "sd")
        StableDiffusionXLPipeline(
            vae=autoencoder(4),
            text_encoder=clip_text(eos_token_id=2, **text),
            text_encoder_2=clip_text(CLIPTextModelWithProjection, projection_dim=64, eos_token_id=2, **text),
            tokenizer=build(),
            tokenizer_2=build(),
            unet=UNet2DConditionModel(
                **common,
                block_out_channels=(64, 128, 768),
                layers_per_block=1,
                down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 1, 3),
                cross_attention_dim=256,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=64 + 6 * 8,
            ),
            scheduler=ddim(),
        ).save_pretrained(folder / "sdxl")


def measured(recipe: Path) -> dict[str, Any]:
    """What a run of ``recipe`` takes, and what is said that it would; in a process of its own."""
    # tensors are given back to the machine as soon as they are freed
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--run", str(recipe)]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(path: Path) -> None:
    """The body of that process."""
    import importlib

    from finetune.config import read_recipe
    from finetune.plan import plan
    from finetune.plan.memory import LIBRARIES
    from finetune.train import Trainer

    recipe = read_recipe(path)
    memory = plan(recipe).memory
    page = importlib.import_module(f"recipes.{recipe.recipe}")
    page.main(read_recipe(path, [f"model.path={path.parent / 'warm'}", f"output={recipe.output}-warm"]))
    held: list[int] = []
    update, steps = Trainer.update, Trainer.steps

    def counted_steps(self: Trainer, batches: Any) -> Any:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
        return steps(self, batches)

    def counted_update(self: Trainer, batch: Any) -> Any:
        loss = update(self, batch)
        held.append(status("VmHWM"))
        return loss

    Trainer.update, Trainer.steps = counted_update, counted_steps  # type: ignore[method-assign]
    baseline = status("VmRSS")
    page.main(recipe)
    print()
    print(json.dumps({"estimated": memory.total - LIBRARIES, "measured": held[-1] - baseline, "parts": memory.parts}))


def status(key: str) -> int:
    """A line of what Linux says of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def main(names: list[str]) -> None:
    """Print a line a recipe."""
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        for name in names or RECIPES:
            found = measured(recipe_of(name, Path(folder)))
            ours, theirs = (found[key] / 2**20 for key in ("estimated", "measured"))
            print(f"{name:<12} {ours:7.0f} MiB {theirs:7.0f} MiB {ours / theirs:6.2f}", flush=True)
            if os.environ.get("PARTS"):
                print({name: round(size / 2**20) for name, size in found["parts"].items()})


if __name__ == "__main__":
    run(Path(sys.argv[2])) if sys.argv[1:2] == ["--run"] else main(sys.argv[1:])
