"""The README of the shipped base: where it comes from, in figures."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

TEXT = """# The base of the embedded world

A small text-to-image latent diffusion model in the ordinary `StableDiffusionPipeline` layout, trained on the procedural
world of `finetune/tinyworld` and on nothing else. `docs/tinyworld.md` shows what it draws and how good it is.

- made by: `finetune tinyworld build-base --work WORK` (`finetune/tinyworld/build.py`), seed {seed}
- steps: {steps}
- machine: {machine}
- minutes of each stage, other work on the same two cores included: {minutes}
- weights are stored in float16 and computed in float32
- licence: that of the project; every training picture is drawn by its renderer

| file | sha256 |
|---|---|
{hashes}
"""


def write(out: Path, *, seed: int, steps: str, machine: str, minutes: Mapping[str, float]) -> Path:
    """Write ``out/base/README.md`` with the hash of every weight file under ``out/base``, ``clip`` and ``judge``."""
    files = [path for name in ("base", "clip", "judge") for path in sorted((out / name).rglob("*.safetensors"))]
    rows = [f"| `{path.relative_to(out)}` | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |" for path in files]
    said = ", ".join(f"{name} {value:g}" for name, value in minutes.items())
    text = TEXT.format(seed=seed, steps=steps, machine=machine, minutes=said, hashes="\n".join(rows))
    target = out / "base" / "README.md"
    target.write_text(text, encoding="utf-8")
    return target
