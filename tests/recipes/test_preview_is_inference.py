"""A picture drawn on the way is the one that the exported adapter draws, and training does not notice it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.config import read_recipe
from finetune.config.schema import SamplerConfig
from finetune.export.read import read_tensors
from finetune.export.sample import sample
from finetune.families import families
from recipes import dreambooth

WriteRecipe = Callable[..., Path]

PROMPTS = ["a photo of <zib> star", "a photo of a star"]
SAMPLER = {"steps": 2, "guidance": 3.0, "scheduler": "EulerDiscreteScheduler"}
WORDS = {"kind": "embedding", "tokens": [{"token": "<zib>", "initializer": "star", "vectors": 2}]}
LORA = {"kind": "lora", "rank": 3, "alpha": 2.0, "text_encoder": True}  # 2 / 3 is rounded when it is multiplied out
KV = {"kind": "full", "select": "cross-kv", "detach_start": True}
CASES: Mapping[str, dict[str, Any]] = {
    "lora": {"adapter": {**LORA, "dropout": 0.1, "targets": "conv"}},
    "lora, bf16": {"adapter": LORA, "export": {"dtype": "bfloat16"}},
    "lora, fp16": {"adapter": LORA, "export": {"dtype": "float16"}},
    "lora, kohya alone": {"adapter": LORA, "export": {"formats": ["kohya"], "dtype": "float16"}},
    "lora, for a tool": {"adapter": LORA, "export": {"for": ["comfyui"], "dtype": "bfloat16"}},
    "lora, half": {"adapter": LORA, "samples": {"strength": 0.5}},
    "lora, average": {"adapter": LORA, "train": {"ema": {"decay": 0.5}}},
    "rslora": {"adapter": {**LORA, "use_rslora": True}},
    "pissa": {"adapter": {**LORA, "init": "pissa", "rank": 2}},
    "dora": {"adapter": {**LORA, "use_dora": True}, "export": {"dtype": "bfloat16"}},
    "dora, differences": {"adapter": {**LORA, "use_dora": True}, "export": {"formats": ["kohya"]}},
    "loha": {"adapter": {"kind": "loha", "rank": 2}, "export": {"dtype": "float16"}},
    "lokr": {"adapter": {"kind": "lokr", "rank": 2}, "export": {"dtype": "float16"}},
    "lokr, kohya alone": {"adapter": {"kind": "lokr", "rank": 2}, "export": {"formats": ["kohya"]}},
    "oft": {"adapter": {"kind": "oft", "block_size": 4}, "export": {"dtype": "float16"}},
    "embedding": {"adapter": WORDS, "export": {"dtype": "float16"}},
    "growing words": {"adapter": {**WORDS, "progressive_steps": 2}},
    "pivotal": {"adapter": {"kind": "pivotal", "embedding": WORDS, "weights": {"kind": "lora", "rank": 2}}},
    "two phases": {
        "adapter": {"kind": "pivotal", "mode": "two-phase", "embedding": WORDS, "weights": {"kind": "lora", "rank": 2}}
    },
    "bundle": {
        "adapter": {"kind": "pivotal", "embedding": WORDS, "weights": {"kind": "lora", "rank": 2}},
        "export": {"formats": ["bundle"]},
    },
    "custom diffusion": {
        "adapter": {"kind": "pivotal", "embedding": WORDS, "weights": KV},
        "export": {"dtype": "bfloat16"},
    },
    "hypernetwork": {"adapter": {"kind": "hypernetwork"}, "export": {"dtype": "float16"}},
    "hypernetwork, .pt": {
        "adapter": {"kind": "hypernetwork", "dropout": [0, 0.3, 0]},
        "export": {"formats": ["a1111"]},
    },
    "full": {"adapter": {"kind": "full", "text_encoder": True}},
    "full, fp16": {"adapter": {"kind": "full", "text_encoder": True}, "export": {"dtype": "float16"}},
    "selection": {"adapter": {"kind": "full", "select": "attention"}, "export": {"dtype": "bfloat16"}},
    "changed scheduler": {"adapter": LORA, "objective": {"prediction": "v_prediction", "zero_terminal_snr": True}},
    "changed scheduler, full": {
        "adapter": {"kind": "full"},
        "objective": {"prediction": "v_prediction", "zero_terminal_snr": True},
    },
}


QUICK = {"lora, fp16", "pissa", "lokr, kohya alone", "two phases", "hypernetwork", "full, fp16"}
"""The others are for the nightly run; tests/test_formats.py asks the same of adapters that were not trained."""


def run(write_recipe: WriteRecipe, folder: Path, name: str, every: int | None, **sections: Any) -> Path:
    """Three steps, and previews on the way."""
    samples = {"every": every, "prompts": PROMPTS, "sampler": SAMPLER, "per_prompt": 2} if every else {}
    captions = {"prompt": PROMPTS[0], "captions": "prompt", "trigger": "<zib>", "class_prompt": "a photo of a star"}
    data = {
        "resolution": 16,
        "concepts": [{"folder": str(folder / "subject"), **captions}],
        "cache": {"folder": str(folder / "cache")},
    }
    train = {"steps": 3, "batch_size": 2, "learning_rate": 1e-2, "threads": 1}
    path = write_recipe(
        **{
            **sections,
            "output": str(folder / name / "zib"),
            "data": data,
            "prior": {"kind": "none"},
            "train": {**train, **sections.get("train", {})},
            "samples": {**samples, **sections.get("samples", {})},
        }
    )
    dreambooth.main(read_recipe(path))
    return folder / name / "zib"


def drawn(run: Path, step: int) -> list[np.ndarray[Any, Any]]:
    folder = run / "samples" / f"step-{step:06d}"
    return [np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))]


def inferred(run: Path, base: str | None = None, strength: float = 1.0) -> list[np.ndarray[Any, Any]]:
    sampler = SamplerConfig.model_validate(SAMPLER)
    pictures = sample(
        run / "adapters", PROMPTS, base=base, seed=3, strength=strength, sampler=sampler, count=2, resolution=16
    )
    return [np.asarray(picture) for picture in pictures]


def tensors(run: Path) -> dict[str, bytes]:
    from finetune.export.read import read_pickle

    files = sorted((run / "adapters").rglob("*.safetensors"))
    found = {
        f"{file.relative_to(run)} {key}": tensor.float().numpy().tobytes()
        for file in files
        for key, tensor in read_tensors(file).items()
    }
    return found or {"pickle": str(read_pickle(next((run / "adapters").rglob("*.pt")))).encode()}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in CASES]
)
def test_a_preview_is_the_picture_of_the_exported_file(
    case: str, write_recipe: WriteRecipe, subject: Path, tiny_sd: Path, tmp_path: Path
) -> None:
    sections = CASES[case]
    looked = run(write_recipe, tmp_path, "looked", 1, **sections)
    said = sections.get("export", {}).get("formats") == ["a1111"]  # a .pt does not say what it belongs to
    expected = inferred(looked, str(tiny_sd) if said else None, sections.get("samples", {}).get("strength", 1.0))
    found = drawn(looked, 3)
    assert len(found) == 4
    assert all(map(np.array_equal, found, expected))
    assert not all(map(np.array_equal, drawn(looked, 1), found)), "nothing moved between the previews"
    assert tensors(looked) == tensors(run(write_recipe, tmp_path, "alone", None, **sections)), "training noticed"


def test_a_preview_reads_no_network_from_disk_twice(
    write_recipe: WriteRecipe, subject: Path, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    family = families()["sd"]
    load = family._read
    monkeypatch.setattr(
        family, "_read", lambda self, network, dtype: read.append(network) or load(self, network, dtype)
    )
    monkeypatch.setattr("recipes.dreambooth.finish", lambda *_: None)
    sections = {"adapter": {"kind": "lora", "rank": 2}, "report": {"enabled": False}}
    run(write_recipe, tmp_path, "looked", 1, **sections)
    before = ["text_encoder", "vae", "denoiser"]  # prompts, pictures, training
    assert sorted(read) == sorted([*before, "text_encoder", "vae"])
