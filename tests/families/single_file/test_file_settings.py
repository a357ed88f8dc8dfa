"""What a single file predicts, and what belongs to a published model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from single_files import SingleFile, base, rewritten
from torch import Tensor

from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import families, load_family, model_folder
from finetune.families.single_file.checkpoint import Checkpoint, Stored, read_checkpoint
from finetune.families.single_file.layouts import SD1, SD2, SDXL, Layout
from finetune.families.single_file.network import network, weights_of
from finetune.families.single_file.published import documents
from finetune.families.single_file.template import template
from finetune.files import model_cache
from finetune.originals import Place
from finetune.originals.tensors import fill
from finetune.tinyworld.tokenizer import build


@pytest.mark.parametrize(
    ("metadata", "key", "setting", "expected"),
    [
        ({}, None, None, "epsilon"),
        ({}, "v_pred", None, "v_prediction"),
        ({"modelspec__prediction_type": "v"}, None, None, "v_prediction"),
        ({"modelspec__predict_key": "v"}, None, None, "v_prediction"),
        ({"modelspec__prediction_type": "epsilon"}, None, "v_prediction", "v_prediction"),
        ({}, None, "v_prediction", "v_prediction"),
    ],
)
def test_what_a_file_predicts(
    metadata: dict[str, str],
    key: str | None,
    setting: Any,
    expected: str,
    twins: dict[str, Path],
    single_file: SingleFile,
) -> None:
    folder = twins[SDXL.name]
    file = single_file(folder, **metadata)
    if key:
        rewritten(file, lambda tensors: tensors.update({key: torch.zeros(0)}))
    found = template(read_checkpoint(file), ModelConfig(path=str(file), like=str(folder), prediction=setting))
    assert found.documents["scheduler/scheduler_config.json"]["prediction_type"] == expected


def test_the_settings_beside_a_file_say_it_and_recipes_do_not(tiny_sd: Path, single_file: SingleFile) -> None:
    file = single_file(tiny_sd)
    settings = file.with_suffix(".yaml")
    for text, expected in (
        ("model: {params: {parameterization: v}}", "v_prediction"),
        ("model: {params: {timesteps: 1000}}", "epsilon"),
        ("model: {path: model.safetensors}", "epsilon"),
        ("[not, settings", "epsilon"),
    ):
        settings.write_text(text)
        assert base(file, like=str(tiny_sd)).process.prediction == expected
    settings.write_text("model: {params: {parameterization: velocity}}")
    with pytest.raises(UserError, match="'velocity'; expected v or eps"):
        base(file, like=str(tiny_sd))


def test_zero_terminal_snr_is_read_as_comfyui_reads_it(twins: dict[str, Path], single_file: SingleFile) -> None:
    folder = twins[SDXL.name]
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    found = base(rewritten(single_file(folder), lambda tensors: tensors.update(marks)), like=str(folder))
    settings = found.scheduler().config
    assert settings["rescale_betas_zero_snr"] and settings["timestep_spacing"] == "trailing"
    assert float(found.process.alphas_cumprod[-1]) == pytest.approx(0, abs=1e-6)


def test_of_sd2_it_must_be_said(twins: dict[str, Path], single_file: SingleFile, hub: Path) -> None:
    file = single_file(twins[SD2.name])
    rewritten(file, lambda tensors: tensors.pop("v_pred"))
    config = ModelConfig(path=str(file))
    with pytest.raises(UserError, match=r"model\.prediction is missing.*768 pixels.*v_prediction"):
        template(read_checkpoint(file), config)


def published(layout: Layout) -> Checkpoint:
    """A file of the published sizes, none of whose bytes is there."""
    tensors: dict[str, Stored] = {}
    for part in families()[layout.family].parts.values():
        settings, component = (
            documents(layout, "epsilon")[f"{part.subfolder}/config.json"],
            layout.components[part.subfolder],
        )
        weights = {component.full(name): value for name, value in weights_of(part, settings).items()}
        held: dict[str, tuple[list[Place], list[Tensor]]] = {}
        for name, place in layout.places(part.subfolder, weights, settings).items():
            places, parts = held.setdefault(place.path, ([], []))
            places.append(place)
            parts.append(weights[name])
        tensors |= {key: Stored(key, tuple(fill(*pieces).shape), "F16") for key, pieces in held.items()}
    return Checkpoint(Path("model.safetensors"), layout, tensors, {})


@pytest.mark.parametrize(
    ("layout", "prediction", "multiple", "sample_size", "scheduler"),
    [
        (SD1, None, 64, 64, "PNDMScheduler"),
        (SD2, "epsilon", 64, 64, "DDIMScheduler"),
        (SD2, "v_prediction", 64, 96, "DDIMScheduler"),
        (SDXL, None, 32, 128, "EulerDiscreteScheduler"),
        (SDXL, "v_prediction", 32, 128, "EulerDiscreteScheduler"),
    ],
)
def test_the_published_models_need_nothing_but_clips_vocabulary(
    layout: Layout, prediction: Any, multiple: int, sample_size: int, scheduler: str, hub: Path, tmp_path: Path
) -> None:
    checkpoint = published(layout)
    found = template(checkpoint, ModelConfig(path="model.safetensors", prediction=prediction))
    for part in found.parts.values():
        network(checkpoint, found, part)  # every weight is of the settings' shape
    found.write(tmp_path / "model")
    family: Any = load_family(ModelConfig(path=str(tmp_path / "model")))
    assert (family.name, family.pixel_multiple) == (layout.family, multiple)
    assert family.process.prediction == (prediction or "epsilon")
    assert family.settings["denoiser"]["sample_size"] == sample_size
    assert type(family.scheduler()).__name__ == scheduler
    openclip = {SD1: [], SD2: ["text_encoder"], SDXL: ["text_encoder_2"]}[layout]
    for name, tokenizer in family.tokenizers.items():
        assert tokenizer.pad_token == ("!" if name in openclip else "<|endoftext|>")
    for one in family.tokenizers.values():
        assert one.model_max_length == 77
        assert one("a red star")["input_ids"] == build()("a red star")["input_ids"]


def test_the_tokenizer_is_asked_for_where_none_is_found(tiny_sd: Path, single_file: SingleFile, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.like is missing.*no tokenizer.*hf download openai/clip-vit-large"):
        model_folder(ModelConfig(path=str(single_file(tiny_sd))))
    assert not model_cache().exists()


def test_another_size_than_the_published_is_named(
    tiny_sd: Path, single_file: SingleFile, hub: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"unet lacks \d+ tensors.*as it was published.*model\.like"):
        base(single_file(tiny_sd))
    assert [path.suffix for path in model_cache().iterdir()] == [".lock"]
