"""From the stages' results to the folders that are shipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from finetune.tinyworld import BASE
from finetune.tinyworld.flow_base import text_encoder
from finetune.tinyworld.tokenizer import build as build_tokenizer
from finetune.tinyworld.training import latents
from finetune.tinyworld.training.flow import build_scheduler as build_flow_scheduler
from finetune.tinyworld.training.unet import build_scheduler

WEIGHTS = ("unet", "vae", "text_encoder")
CLIP = "clip-fill"
"""The stage whose text encoder is shipped."""


def pipeline(work: Path, unet: UNet2DConditionModel | None = None) -> StableDiffusionPipeline:
    """The base as trained so far, its weights rounded to float16 and computed in float32."""
    vae: Any = AutoencoderKL.from_pretrained(work / "vae" / "model")
    vae.register_to_config(scaling_factor=latents.load(work / "latents")[2])
    text: Any = CLIPTextModel.from_pretrained(work / CLIP / "model" / "text_encoder")
    denoiser: Any = unet if unet is not None else UNet2DConditionModel.from_pretrained(work / "unet" / "model")
    parts = [latents.rounded(part).eval().requires_grad_(False) for part in (vae, text, denoiser)]
    return StableDiffusionPipeline(
        vae=parts[0],
        text_encoder=parts[1],
        tokenizer=build_tokenizer(),
        unet=parts[2],
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save(base: StableDiffusionPipeline, folder: Path) -> None:
    """Write an ordinary pipeline folder whose weights are stored in float16."""
    base.save_pretrained(folder)
    for part in WEIGHTS:
        _halve(folder / part)
    for config in folder.glob("*/config.json"):
        entries = json.loads(config.read_text())
        entries.pop("_name_or_path", None)  # where it was trained is nobody's business
        if config.parent.name == "text_encoder":
            entries["dtype"] = "float32"
        config.write_text(json.dumps(entries, indent=2) + "\n")


def _halve(folder: Path) -> None:
    """Store a part's weights in float16."""
    for path in folder.glob("*.safetensors"):
        stored = load_file(path)
        halves = {key: value.half() if value.is_floating_point() else value for key, value in stored.items()}
        save_file(halves, path, metadata={"format": "pt"})
        path.chmod(0o644)


def save_flow(denoiser: Path, folder: Path) -> None:
    """Write what the flow-matching base does not share with the other: denoiser, scheduler, ``model_index.json``."""
    text, words = text_encoder(), build_tokenizer()
    loaded: Any = SD3Transformer2DModel.from_pretrained(denoiser)
    whole = StableDiffusion3Pipeline(
        transformer=loaded,
        vae=AutoencoderKL.from_pretrained(BASE / "vae"),  # type: ignore[arg-type]
        scheduler=build_flow_scheduler(),
        **dict.fromkeys(("text_encoder", "text_encoder_2"), text),
        **dict.fromkeys(("tokenizer", "tokenizer_2"), words),
        **dict.fromkeys(("text_encoder_3", "tokenizer_3")),
    )
    whole.save_config(folder)
    whole.scheduler.save_pretrained(folder / "scheduler")
    loaded.save_pretrained(folder / "transformer")
    _halve(folder / "transformer")
    settings = folder / "transformer" / "config.json"
    entries = json.loads(settings.read_text(encoding="utf-8"))
    entries.pop("_name_or_path", None)
    settings.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def load(folder: Path = BASE) -> Any:
    """The pipeline of a shipped base, float32 on the CPU."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    absent = [name for name, value in index.items() if value == [None, None]]
    return DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(absent))  # which asks to be told of each


def sample(
    base: Any,
    prompts: list[str],
    *,
    seed: int = 0,
    steps: int = 25,
    guidance: float = 4.0,
    batch: int = 32,
) -> torch.Tensor:
    """Pictures float (N, 3, 64, 64) in [0, 1]; picture i depends on its prompt, ``seed`` and i alone."""
    base.set_progress_bar_config(disable=True)
    done = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        noise = [torch.Generator().manual_seed(seed * 100_003 + start + at) for at in range(len(some))]
        with torch.no_grad():
            made: Any = base(
                some, num_inference_steps=steps, guidance_scale=guidance, generator=noise, output_type="pt"
            )
        done.append(made.images)
    return torch.cat(done)


def save_towers(trained: Path, folder: Path) -> None:
    """Write what the small CLIP has beside the text encoder: image tower and projections, in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    towers = {key: value.half() for key, value in load_file(trained / "towers.safetensors").items()}
    save_file(towers, folder / "towers.safetensors")
    (folder / "towers.safetensors").chmod(0o644)
    (folder / "towers.json").write_text((trained / "towers.json").read_text())
