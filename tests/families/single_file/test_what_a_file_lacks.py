"""What a single file does not hold and takes from another model, and what other tools call differently."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from single_files import SingleFile, base, change, rewritten, without
from torch import Tensor

from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import load_family
from finetune.families.single_file.layouts import DENOISER, FLUX, SD3


def bare(tensors: dict[str, Tensor]) -> None:
    """As FLUX.1 was published: the transformer, whose keys have no prefix."""
    for key in list(tensors):
        value = tensors.pop(key)
        if key.startswith(DENOISER):
            tensors[key.removeprefix(DENOISER)] = value


def equal(found: Any, wanted: Any, part: str) -> bool:
    there, here = (family.fresh(part).state_dict() for family in (found, wanted))
    return there.keys() == here.keys() and all(torch.equal(there[key], here[key]) for key in here)


@pytest.mark.parametrize("name", [SD3.name, FLUX.name])
def test_a_transformer_alone_takes_the_rest_from_another_model(
    name: str, twins: dict[str, Path], single_file: SingleFile
) -> None:
    folder, whole = twins[name], single_file(twins[name], name="whole.safetensors")
    file = rewritten(single_file(folder), bare)
    found, wanted = base(file, like=str(folder)), base(whole, like=str(folder))
    assert all(equal(found, wanted, part) for part in wanted.parts)
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert (found.folder / weights).samefile(folder / weights), "large files are not copied"
    named = "holds no vae, text_encoder, text_encoder_2.* and no settings and no tokenizers"
    with pytest.raises(UserError, match=rf"model\.like is missing.*{named}.*{name}"):
        base(file)


def test_what_the_other_model_lacks_is_named(twins: dict[str, Path], single_file: SingleFile, tmp_path: Path) -> None:
    file = rewritten(single_file(twins[FLUX.name]), bare)
    like = Path(shutil.copytree(twins[FLUX.name], tmp_path / "like"))
    (like / "vae" / "diffusion_pytorch_model.safetensors").rename(like / "vae" / "model.fp16.safetensors")
    with pytest.raises(UserError, match=r"model\.like: .*like has no safetensors of the vae, and .* holds none"):
        base(file, like=str(like))


@pytest.mark.parametrize("there", [True, False])
def test_sd3_may_have_no_t5(there: bool, twins: dict[str, Path], single_file: SingleFile, tmp_path: Path) -> None:
    like = Path(shutil.copytree(twins[SD3.name], tmp_path / "like"))
    change(like / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    for folder in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(like / folder)
    file = single_file(twins[SD3.name])
    if there:
        with pytest.raises(UserError, match=r"model\.like: .* has no text_encoder_3, which .* holds"):
            base(file, like=str(like))
    else:
        found = base(rewritten(file, without("text_encoders.t5xxl.")), like=str(like))
        assert "text_encoder_3" not in found.parts
        assert equal(found, base(single_file(like, name="other.safetensors"), like=str(like)), "text_encoder_2")


def test_what_is_not_said_of_clips_projection_is_the_identity(twins: dict[str, Path], single_file: SingleFile) -> None:
    key = "text_encoders.clip_l.transformer.text_projection.weight"
    file = rewritten(single_file(twins[SD3.name]), lambda tensors: tensors.pop(key))
    found = base(file, like=str(twins[SD3.name]))
    assert torch.equal(found.fresh("text_encoder").text_projection.weight, torch.eye(16))
    file = rewritten(file, lambda tensors: tensors.pop(key.replace("clip_l", "clip_g")))
    with pytest.raises(UserError, match=r"text_encoder_2 lacks 1 tensors.*clip_g.*text_projection"):
        base(file, like=str(twins[SD3.name]))


def test_numbers_of_8_bits_are_read_without_loss(twins: dict[str, Path], single_file: SingleFile) -> None:
    kinds = {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.float8_e4m3fn, "shared.weight": torch.float8_e5m2}
    stored: dict[str, Tensor] = {}

    def edit(tensors: dict[str, Tensor]) -> None:
        for name, kind in kinds.items():
            key = f"text_encoders.t5xxl.transformer.{name}"
            stored[name] = tensors[key] = tensors[key].to(kind)

    found = base(rewritten(single_file(twins[FLUX.name]), edit), like=str(twins[FLUX.name])).fresh("text_encoder_2")
    for name, value in stored.items():
        assert torch.equal(found.get_parameter(name), value.float())


def test_the_autoencoder_of_flux_has_two_prefixes(twins: dict[str, Path], single_file: SingleFile) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith("vae.")]:
            tensors["first_stage_model." + key.removeprefix("vae.")] = tensors.pop(key)

    folder = str(twins[FLUX.name])
    found = base(rewritten(single_file(twins[FLUX.name]), edit), like=folder)
    assert equal(found, load_family(ModelConfig(path=folder)), "vae")


def test_a_file_that_was_trained_from_a_hub_model_finds_it_in_the_cache(
    twins: dict[str, Path], single_file: SingleFile, hub: Path
) -> None:
    shutil.copytree(twins[FLUX.name], hub.parents[2] / "models--owner--flux" / "snapshots" / "abc")
    (hub.parents[2] / "models--owner--flux" / "refs").mkdir()
    (hub.parents[2] / "models--owner--flux" / "refs" / "main").write_text("abc")
    found = base(single_file(twins[FLUX.name], finetune__base="owner/flux"))
    assert found.name == "flux"
    with pytest.raises(UserError, match=r"model\.like is missing"):
        base(single_file(twins[FLUX.name], finetune__base="owner/another"))
