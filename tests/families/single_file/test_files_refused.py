"""Single files that cannot be trained, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from single_files import SingleFile, base, rewritten, without
from torch import Tensor

from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import model_folder
from finetune.families.single_file.layouts import FLUX, SD1, SDXL


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_pickles_are_never_opened(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(UserError, match=r"is a pickle, which can run any code.*\.safetensors"):
        model_folder(ModelConfig(path=str(file)))


def put(**tensors: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda held: held.update({key.replace("__", "."): value for key, value in tensors.items()})


def only(**tensors: Tensor) -> Callable[[dict[str, Tensor]], None]:
    def edit(held: dict[str, Tensor]) -> None:
        held.clear()
        put(**tensors)(held)

    return edit


ONE = torch.ones(1)
FIRST = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (without("cond_stage_model."), "holds a U-Net and no text encoder"),
        (only(lora_unet_mid_block__lora_down__weight=ONE), "holds an adapter"),
        (only(conditioner__embedders__0__model__ln_final__weight=ONE), "SDXL's refiner"),
        (only(double_blocks__0__img_attn__qkv__weight=ONE), "its first key is 'double_blocks"),
        (put(edm_mean=ONE), "EDM's"),
        (lambda tensors: tensors.update({FIRST: torch.ones(16, 9, 3, 3)}), "9 input channels.*inpainting"),
        (put(model__diffusion_model__label_emb__weight=ONE), "1 tensors too many.*label_emb"),
        (lambda tensors: tensors.pop("model.diffusion_model.out.2.bias"), r"lacks 1 tensors.*out\.2\.bias"),
        (
            lambda tensors: tensors.update({"model.diffusion_model.out.2.bias": torch.ones(5)}),
            r"makes a weight of \[5\]; expected \[4\]",
        ),
        (lambda tensors: tensors.update({FIRST: tensors[FIRST].to(torch.uint8)}), "is U8; expected one of"),
        (put(model__diffusion_model__out__2__scale_weight=ONE), "numbers are packed"),
        (only(down_blocks__0__resnets__0__conv1__weight=ONE), "is one network of a diffusers folder"),
    ],
)
def test_what_cannot_be_trained_says_why(
    edit: Callable[[dict[str, Tensor]], object],
    said: str,
    tiny_sd: Path,
    single_file: SingleFile,
) -> None:
    file = rewritten(single_file(tiny_sd), edit)
    with pytest.raises(UserError, match=said):
        base(file, like=str(tiny_sd))


def test_a_transformer_that_reads_more_than_latents_is_refused(twins: dict[str, Path], single_file: SingleFile) -> None:
    edits = put(model__diffusion_model__img_in__weight=torch.ones(16, 128))
    with pytest.raises(UserError, match=r"128 input channels.*control models cannot be trained"):
        base(rewritten(single_file(twins[FLUX.name]), edits), like=str(twins[FLUX.name]))


def test_flow_models_predict_one_thing(twins: dict[str, Path], single_file: SingleFile) -> None:
    with pytest.raises(UserError, match=r"model\.prediction has no meaning for FLUX\.1"):
        base(single_file(twins[FLUX.name]), like=str(twins[FLUX.name]), prediction="epsilon")


def test_a_file_that_is_cut_off_is_refused(tiny_sd: Path, single_file: SingleFile) -> None:
    file = single_file(tiny_sd)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="no whole safetensors file"):
        base(file, like=str(tiny_sd))


def test_a_model_of_another_kind_is_not_like_it(twins: dict[str, Path], single_file: SingleFile) -> None:
    with pytest.raises(UserError, match=r"model\.like:.*another kind of model.*Stable Diffusion 1\.x"):
        base(single_file(twins[SD1.name]), like=str(twins[SDXL.name]))


@pytest.mark.parametrize("setting", [{"like": "tinyworld"}, {"prediction": "epsilon"}])
def test_settings_of_single_files_are_for_single_files(setting: dict[str, Any], tiny_sd: Path) -> None:
    for path in (str(tiny_sd), "tinyworld"):
        with pytest.raises(UserError, match=r"is for a single file, and '.*' is none"):
            model_folder(ModelConfig(path=path, **setting))


def test_a_file_that_is_not_there_names_its_neighbour(
    tiny_sd: Path, single_file: SingleFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    single_file(tiny_sd, name="dreamshaper.safetensors")
    monkeypatch.chdir(tmp_path)
    for path in ("dreamshape.safetensors", "models/dreamshaper.safetensors"):  # neither is a hub name
        with pytest.raises(UserError, match=r"no folder or file"):
            model_folder(ModelConfig(path=path))
    with pytest.raises(UserError, match=r"did you mean 'dreamshaper\.safetensors'"):
        model_folder(ModelConfig(path=str(tmp_path / "dreamshape.safetensors")))
