"""The flow-matching base: a transformer of its own, with text encoder, tokenizer and autoencoder of the other base.

What is shipped is the transformer alone. The folder that diffusers loads is put together from both on first use.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from finetune import files
from finetune.tinyworld import BASE, FLOW

CLIP = BASE.parent / "clip"
WEIGHTS = "diffusion_pytorch_model.safetensors"
NAME = "tinyworld-flow"


def folder() -> Path:
    """A ``StableDiffusion3Pipeline`` folder in the user's cache, below ``HF_HOME``.

    Its name holds a digest of what it is made from, so that another version of the package never reads it.
    """
    made = files.model_cache() / f"{NAME}-{_digest()}"
    if not made.is_dir():
        made.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(made.parent / f".{NAME}.lock"):
            if not made.is_dir():
                with files.replacing_folder(made) as temporary:
                    write(temporary, FLOW)
    return made


def write(to: Path, own: Path) -> None:
    """Put the whole folder together.

    Args:
        to: an empty folder.
        own: transformer, scheduler and ``model_index.json``, as they are shipped.
    """
    for part in ("transformer", "scheduler"):
        shutil.copytree(own / part, to / part)
    shutil.copytree(BASE / "vae", to / "vae")
    settings = json.loads((BASE / "vae" / "config.json").read_text(encoding="utf-8"))
    # SD 3's pipeline adds a shift, which an autoencoder of SD 1 does not have
    files.write_json(to / "vae" / "config.json", {**settings, "shift_factor": 0.0})
    encoder = text_encoder()
    for end in ("", "_2"):  # SD 3 reads each prompt with two CLIPs; both are the one that there is
        shutil.copytree(BASE / "tokenizer", to / f"tokenizer{end}")
        settings = json.loads((BASE / "text_encoder" / "config.json").read_text(encoding="utf-8"))
        settings |= {"architectures": [type(encoder).__name__]}
        files.write_json(to / f"text_encoder{end}" / "config.json", settings)
        halves = {name: value.half() for name, value in encoder.state_dict().items()}
        files.write_tensors(to / f"text_encoder{end}" / "model.safetensors", halves, {"format": "pt"})
    shutil.copyfile(own / "model_index.json", to / "model_index.json")


def text_encoder() -> Any:
    """The text tower of the small CLIP with its projection, float32 on the CPU, frozen.

    The other base has it without the projection, which lies beside the image tower.
    """
    encoder: Any = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(BASE / "text_encoder"))
    encoder.text_model.load_state_dict(load_file(BASE / "text_encoder" / "model.safetensors"))
    projection = load_file(CLIP / "towers.safetensors")["text_projection.weight"]
    encoder.text_projection.load_state_dict({"weight": projection})
    return encoder.to(torch.float32).eval().requires_grad_(False)


@functools.cache
def _digest() -> str:
    """Of this module and all files that the folder is made from."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for file in sorted(file for part in (BASE, CLIP, FLOW) for file in part.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(BASE.parent)} {files.sha256(file)}\n".encode())
    return digest.hexdigest()[:16]
