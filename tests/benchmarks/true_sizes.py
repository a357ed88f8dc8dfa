"""What plans say of models of true size, of which there are settings and no weights.

    python tests/benchmarks/true_sizes.py

Prints for each model what a LoRA of rank 16 at batch 1 would take with every profile and with none, in GiB.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from finetune.config import read_recipe
from finetune.families import sdxl
from finetune.families.tiny import write_tiny_sd
from finetune.plan import plan

VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 512,  # of a tile
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
}
CLIP_G = {**CLIP_L, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
SIZES: dict[str, dict[str, dict[str, Any]]] = {  # as the published settings have them
    "sd": {
        "vae": VAE,
        "text_encoder": CLIP_L,
        "unet": {
            "block_out_channels": [320, 640, 1280, 1280],
            "layers_per_block": 2,
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            "norm_num_groups": 32,
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
        },
    },
    "sdxl": {
        "vae": {**VAE, "sample_size": 1024},
        "text_encoder": CLIP_L,
        "text_encoder_2": {**CLIP_G, "projection_dim": 1280},
        "unet": {
            "block_out_channels": [320, 640, 1280],
            "transformer_layers_per_block": [1, 2, 10],
            "norm_num_groups": 32,
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    },
}


def write(folder: Path, name: str) -> Path:
    """A twin's folder with the settings of the true model, and a recipe for it."""
    model = {"sd": write_tiny_sd, "sdxl": sdxl.tiny}[name](folder / name)
    for part, settings in SIZES[name].items():
        file = model / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | settings), encoding="utf-8")
    side = {"sd": 512, "sdxl": 1024}[name]
    (folder / f"{name}-pictures").mkdir()
    Image.new("RGB", (side, side)).save(folder / f"{name}-pictures" / "0.png")
    recipe = {
        "recipe": "lora",
        "output": str(folder / "run"),
        "model": {"path": str(model)},
        "adapter": {"kind": "lora", "rank": 16},
        "data": {
            "resolution": side,
            "concepts": [{"folder": str(folder / f"{name}-pictures"), "prompt": "a star"}],
            "cache": {"folder": str(folder / "cache")},
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def main() -> None:
    """Print a line a model."""
    with tempfile.TemporaryDirectory() as folder:
        for name in SIZES:
            found = plan(read_recipe(write(Path(folder), name)), profiles=True)
            needed = {fit.profile: fit.bytes for fit in found.fits} | {"float32": found.memory.most}
            print(name, {profile: round(size / 2**30, 1) for profile, size in needed.items()}, flush=True)


if __name__ == "__main__":
    main()
