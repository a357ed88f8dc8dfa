"""A checkpoint file in, a checkpoint file out, and the next run on that."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.config import read_recipe
from finetune.config.schema import ModelConfig, SamplerConfig
from finetune.export import identify, verify
from finetune.export.sample import sample
from finetune.families import flux, load_family, model_folder
from finetune.plan import plan
from recipes import dreambooth

WriteRecipe = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_file_is_planned_trained_resumed_reported_and_trained_on(
    write_recipe: WriteRecipe, tiny_sd: Path, single_file: Callable[..., Path], tmp_path: Path
) -> None:
    model = {"path": str(single_file(tiny_sd)), "like": str(tiny_sd)}
    settings: dict[str, object] = {
        "adapter": {"kind": "full"},
        "prior": {"kind": "none"},
        "train": {"steps": 3, "batch_size": 2, "learning_rate": 1e-3, "threads": 1},
        "checkpoint": {"every": 2, "keep": 3},
        "export": {"formats": ["single-file"]},
        "report": {"per_prompt": 1, "sampler": {"steps": 2}},
    }
    path = write_recipe(model=model, **settings)
    assert "adapters/run.safetensors" in plan(read_recipe(path)).output.files
    dreambooth.main(read_recipe(path))
    run = tmp_path / "run"
    (file,) = (run / "adapters").iterdir()
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "from_single_file" in page and "from_pretrained" not in page
    whole = file.read_bytes()

    shutil.rmtree(run / "checkpoints" / "step-000003")
    shutil.rmtree(run / "adapters")
    dreambooth.main(read_recipe(path))
    assert file.read_bytes() == whole

    (picture,) = sample(run, ["a photo of zib star"], sampler=SamplerConfig(steps=2))
    assert picture.size == (16, 16)
    shutil.move(run, tmp_path / "first")
    learned = tmp_path / "first" / "adapters" / file.name
    dreambooth.main(read_recipe(write_recipe(model={"path": str(learned)}, **settings)))
    assert identify(run).layout == "single-file"
    assert load_family(read_recipe(path).model).source == str(learned)


def test_a_transformer_alone_becomes_a_whole_model(
    write_recipe: WriteRecipe, single_file: Callable[..., Path], tmp_path: Path
) -> None:
    folder = flux.tiny(tmp_path / "flux")
    file, prefix = single_file(folder), "model.diffusion_model."
    tensors = {key.removeprefix(prefix): value for key, value in load_file(file).items() if key.startswith(prefix)}
    save_file(tensors, file)
    path = write_recipe(
        model={"path": str(file), "like": str(folder)},
        adapter={"kind": "full", "select": "attention"},
        prior={"kind": "none"},
        train={"steps": 1, "batch_size": 2, "learning_rate": 1e-3, "threads": 1},
        export={"formats": ["single-file"], "dtype": "bfloat16"},
    )
    dreambooth.main(read_recipe(path))
    (learned,) = (tmp_path / "run" / "adapters").iterdir()
    assert set(tensors) < {key.removeprefix(prefix) for key in load_file(learned)}
    found = load_family(ModelConfig(path=str(learned)))
    assert (found.name, found.guidance) == ("flux", 1.0)


def test_a_small_base_in_memory_is_the_same_from_a_file_as_from_its_folder(
    write_recipe: WriteRecipe, tiny_sd: Path, single_file: Callable[..., Path], tmp_path: Path
) -> None:
    file = {"path": str(single_file(tiny_sd)), "like": str(tiny_sd)}
    folder = {"path": str(model_folder(ModelConfig(**file)))}
    small = {"dtype": "bfloat16", "quantize": {"kind": "int8"}, "block_swap": 1}
    weights = []
    for name, model in (("file", file), ("folder", folder)):
        path = write_recipe(
            model={**model, **small},
            output=str(tmp_path / name),
            prior={"kind": "none"},
            train={"steps": 1, "batch_size": 2, "learning_rate": 1e-3, "gradient_checkpointing": True, "threads": 1},
        )
        dreambooth.main(read_recipe(path))
        (written,) = (tmp_path / name / "adapters").glob("pytorch_lora_weights.safetensors")
        verify(written).require()
        weights.append(load_file(written))
    one, two = weights
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
