"""Whole models as diffusers folders."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import GuardError, UserError
from finetune.export import export, identify, read, verify
from finetune.export.full import write_model


def tensors_of(folder):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    parts = {"denoiser": pipeline.unet, "text_encoder": pipeline.text_encoder, "vae": pipeline.vae}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


@pytest.mark.parametrize("settings", [{"text_encoder": True}, {"select": "cross-kv"}], ids=["all", "selection"])
def test_reloaded_weights_are_bit_equal(settings, tiny_sd, trained, recipe, tmp_path):
    family, adapter = trained("full", **settings)
    weights = adapter.weights()
    (path,) = export(weights, family, recipe(adapter={"kind": "full"}), tmp_path / "adapters")
    base, there = tensors_of(tiny_sd), tensors_of(path)
    assert there.keys() == base.keys()
    for name, tensor in there.items():
        assert torch.equal(tensor, weights.tensors.get(name, base[name])), name
    assert verify(path, weights=weights).require()
    assert identify(tmp_path).path == path


def test_text_encoder_has_the_level_that_older_loaders_expect(trained, recipe, tmp_path):
    """Transformers before 5.6 takes a file without it for random weights and only warns."""
    family, adapter = trained("full", select="cross-kv")
    (path,) = export(adapter.weights(), family, recipe(adapter={"kind": "full"}), tmp_path)
    assert all(key.startswith("text_model.") for key in load_file(path / "text_encoder" / "model.safetensors"))


def test_read_gives_back_every_weight(trained, recipe, tmp_path):
    family, adapter = trained("full", text_encoder=True)
    weights = adapter.weights()
    (path,) = export(weights, family, recipe(adapter={"kind": "full"}), tmp_path)
    back = read(path, family.export_names).tensors
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.tensors.items())


def test_half_precision_loads_as_such(trained, recipe, tmp_path):
    family, adapter = trained("full", select="cross-kv")
    chosen = recipe(adapter={"kind": "full"}, export={"dtype": "float16"})
    (path,) = export(adapter.weights(), family, chosen, tmp_path)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(path, torch_dtype=torch.float16)
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float16}
    assert verify(path, weights=adapter.weights()).require()


def test_only_trained_safetensors_are_taken_over(tiny_sd, trained, tmp_path):
    """Variants and pickles beside them would hold untrained weights."""
    base = shutil.copytree(tiny_sd, tmp_path / "base")
    (base / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    shutil.copy(base / "unet" / "diffusion_pytorch_model.safetensors", base / "unet" / "x.fp16.safetensors")
    index = json.loads((base / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (base / "model_index.json").write_text(json.dumps(index))
    family, adapter = trained("full", select="cross-kv")
    path = write_model(adapter.weights(), base, tmp_path / "out", family.export_names, torch.float32)
    assert sorted(file.name for file in (path / "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert verify(path, weights=adapter.weights()).require()


def test_shards_stay_shards(tiny_sd, trained, tmp_path):
    base = shutil.copytree(tiny_sd, tmp_path / "base")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(base)
    for part, model in (("unet", pipeline.unet), ("text_encoder", pipeline.text_encoder)):
        shutil.rmtree(base / part)
        model.save_pretrained(base / part, max_shard_size="40KB")
        assert len(list((base / part).glob("*.safetensors"))) > 1
    family, adapter = trained("full", text_encoder=True)
    path = write_model(adapter.weights(), base, tmp_path / "out", family.export_names, torch.float32)
    assert len(list((path / "unet").glob("*.safetensors"))) > 1
    assert verify(path, weights=adapter.weights()).require()


def test_older_base_with_the_level_in_its_names(tiny_sd, trained, tmp_path):
    base = shutil.copytree(tiny_sd, tmp_path / "base")
    file = base / "text_encoder" / "model.safetensors"
    old = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(file).items()}
    save_file(old | {"text_model.embeddings.position_ids": torch.arange(16)[None]}, file, {"format": "pt"})
    family, adapter = trained("full", text_encoder=True)
    path = write_model(adapter.weights(), base, tmp_path / "out", family.export_names, torch.float32)
    assert verify(path, weights=adapter.weights()).require()


def test_weights_without_a_place_or_of_another_shape_are_refused(tiny_sd, trained, tmp_path):
    family, adapter = trained("full", select="cross-kv")
    weights = adapter.weights()
    name = min(weights.tensors)
    for tensors, says in (
        ({**weights.tensors, "denoiser.nowhere.weight": torch.ones(2)}, "no place"),
        ({**weights.tensors, name: torch.ones(2)}, "in the base model"),
        ({**weights.tensors, name: weights.tensors[name] * float("inf")}, "NaN or infinite"),
    ):
        with pytest.raises(GuardError, match=says):
            write_model(
                replace(weights, tensors=tensors), tiny_sd, tmp_path / "out", family.export_names, torch.float32
            )
    assert not list(tmp_path.iterdir())


def test_model_that_learned_nothing_is_refused(tiny_sd, tiny_family, tmp_path):
    weights = read(tiny_sd, tiny_family.export_names)
    with pytest.raises(GuardError, match="nothing was learned"):
        write_model(weights, tiny_sd, tmp_path / "out", tiny_family.export_names, torch.float32)


def test_pickled_base_is_refused(tiny_sd, trained, tmp_path):
    base = shutil.copytree(tiny_sd, tmp_path / "base")
    (base / "vae" / "diffusion_pytorch_model.safetensors").rename(base / "vae" / "diffusion_pytorch_model.bin")
    family, adapter = trained("full", select="cross-kv")
    with pytest.raises(UserError, match=r"only diffusion_pytorch_model\.bin"):
        write_model(adapter.weights(), base, tmp_path / "out", family.export_names, torch.float32)


def test_damaged_folder_fails(trained, recipe, tmp_path):
    family, adapter = trained("full", select="cross-kv")
    (path,) = export(adapter.weights(), family, recipe(adapter={"kind": "full"}), tmp_path)
    file = path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if key != "conv_in.weight"}, file, {"format": "pt"})
    failed = [check.name for check in verify(path).checks if not check.passed]
    assert "diffusers: every weight arrives" in failed or "diffusers: loads" in failed
    file.write_bytes(file.read_bytes()[:-8])
    assert not verify(path).passed
