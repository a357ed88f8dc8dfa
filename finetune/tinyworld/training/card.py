"""The READMEs of the shipped bases: where they come from, in figures."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

BASE = """# The base of the embedded world

A small text-to-image latent diffusion model in the ordinary `StableDiffusionPipeline` layout, trained on the procedural
world of `finetune/tinyworld` and on nothing else. `docs/tinyworld.md` shows what it draws and how good it is.

- made by: `finetune tinyworld build-base --work WORK` (`finetune/tinyworld/build.py`), seed {seed}
"""
FLOW = """# The flow-matching base of the embedded world

The transformer of a small text-to-image model in SD 3's layout, trained on the procedural world of `finetune/tinyworld`
and on nothing else, by flow matching. Text encoder, tokenizer and autoencoder are those of `../base`;
`finetune.tinyworld.base("tinyworld-flow")` puts the `StableDiffusion3Pipeline` folder together. `docs/tinyworld.md`
shows what it draws and how good it is.

- made by: `finetune tinyworld build-flow --work WORK` (`finetune/tinyworld/build_flow.py`), seed {seed}
"""
FIGURES = """- steps: {steps}
- machine: {machine}
- minutes of each stage, other work on the same two cores included: {minutes}
- weights are stored in float16 and computed in float32
- licence: that of the project; every training picture is drawn by its renderer

| file | sha256 |
|---|---|
{hashes}
"""


def write(
    out: Path, text: str, folders: Sequence[str], *, seed: int, steps: str, machine: str, minutes: Mapping[str, float]
) -> Path:
    """Write the README of the first of ``folders`` below ``out``, with the hash of every weight file in all of them.

    Args:
        text: how it begins, ``BASE`` or ``FLOW``.
    """
    files = [path for name in folders for path in sorted((out / name).rglob("*.safetensors"))]
    rows = [f"| `{path.relative_to(out)}` | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |" for path in files]
    said = ", ".join(f"{name} {value:g}" for name, value in minutes.items())
    text = (text + FIGURES).format(seed=seed, steps=steps, machine=machine, minutes=said, hashes="\n".join(rows))
    target = out / folders[0] / "README.md"
    target.write_text(text, encoding="utf-8")
    return target
