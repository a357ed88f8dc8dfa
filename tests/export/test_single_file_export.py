"""Whole models as single files: written, read back, and loaded by diffusers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.config.schema import ModelConfig
from finetune.errors import GuardError, UserError
from finetune.export import export, identify, pieces, read, verify
from finetune.export.base import load_base
from finetune.export.sample import adapted
from finetune.export.single_file import write_single_file
from finetune.families import flux, load_family, sd3, sdxl
from finetune.families.single_file.layouts import layout_of
from finetune.objectives import DDPM

FORMATS = {"formats": ["single-file"]}
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="session")
def bases(tiny_sd, tiny_sd_v, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    openclip = Path(shutil.copytree(tiny_sd_v, folder / "sd2"))
    settings = openclip / "text_encoder" / "config.json"
    settings.write_text(settings.read_text().replace("quick_gelu", "gelu"))
    return {
        "sd1": tiny_sd,
        "sd2": openclip,
        "sdxl": sdxl.tiny(folder / "sdxl"),
        "sd3": sd3.tiny(folder / "sd3"),
        "flux": flux.tiny(folder / "flux"),
    }


def header(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sd3", "flux"])
def test_every_weight_is_read_back_bit_for_bit(name, bases, trained, recipe, tmp_path):
    base = bases[name]
    family, adapter = trained("full", base, text_encoder=True)
    weights = adapter.weights()
    chosen = recipe(adapter={"kind": "full"}, export=FORMATS, model={"path": str(base)})
    (path,) = export(weights, family, chosen, tmp_path / "adapters")
    assert path.name == "zib.safetensors"
    found = verify(path, weights=weights).require()
    asked = "diffusers: not asked" if name == "flux" else "diffusers: every weight arrives"
    assert asked in {check.name for check in found.checks}
    back, whole = read(path, family.export_names).tensors, read(base, family.export_names).tensors
    assert back.keys() == whole.keys()
    for key, value in back.items():
        assert torch.equal(value, weights.tensors.get(key, whole[key])), key
    there = identify(tmp_path)
    assert (there.path, there.layout, there.whole) == (path, "single-file", True)


def test_what_diffusers_reads_otherwise_is_said(bases, trained, recipe, tmp_path):
    for text_encoder in (False, True):
        family, adapter = trained("full", bases["sd3"], text_encoder=text_encoder)
        chosen = recipe(adapter={"kind": "full"}, export=FORMATS, model={"path": str(bases["sd3"])})
        (path,) = export(adapter.weights(), family, chosen, tmp_path / "adapters")
        (found,) = [check for check in verify(path).require().checks if check.name.endswith("arrives")]
        assert ("not text_encoder.text_projection.weight" in found.detail) == text_encoder


@pytest.mark.slow
def test_diffusers_reads_flux_of_the_published_width(bases, trained, recipe, tmp_path):
    base = Path(shutil.copytree(bases["flux"], tmp_path / "base"))
    settings = {**diffusers.FluxTransformer2DModel.load_config(base, subfolder="transformer")}
    settings |= {"num_attention_heads": 24, "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]}
    diffusers.FluxTransformer2DModel.from_config(settings).to(torch.bfloat16).save_pretrained(base / "transformer")
    family, adapter = trained("full", base, select="norm-bias")
    export_ = {**FORMATS, "dtype": "bfloat16"}
    chosen = recipe(adapter={"kind": "full"}, export=export_, model={"path": str(base)})
    (path,) = export(adapter.weights(), family, chosen, tmp_path / "adapters")
    found = verify(path, weights=adapter.weights()).require()
    assert "diffusers: every weight arrives" in {check.name for check in found.checks}
    assert header(path)["modelspec.architecture"] == "flux-1-dev"


def test_diffusers_draws_the_same_picture_with_the_file_as_with_the_folder(bases, trained, recipe, tmp_path):
    family, adapter = trained("full", bases["sd1"], text_encoder=True)
    chosen = recipe(adapter={"kind": "full"}, export={"formats": ["diffusers", "single-file"]})
    folder, file = export(adapter.weights(), family, chosen, tmp_path / "adapters")
    assert [one.path for one in pieces(tmp_path)] == [folder], "one of them is enough to draw with"
    kind, pictures = diffusers.StableDiffusionPipeline, []
    for pipeline in (
        kind.from_pretrained(folder, safety_checker=None),
        kind.from_single_file(str(file), config=str(folder), local_files_only=True, safety_checker=None),
        adapted(file).pipeline(),
    ):
        pipeline.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        pictures.append(pipeline("a red star", num_inference_steps=2, output_type="pt", generator=noise).images)
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2])


def test_half_precision(trained, recipe, tmp_path):
    family, adapter = trained("full", select="cross-kv")
    chosen = recipe(adapter={"kind": "full"}, export={**FORMATS, "dtype": "float16"})
    (path,) = export(adapter.weights(), family, chosen, tmp_path / "adapters")
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    assert verify(path, weights=adapter.weights()).require()


@pytest.mark.parametrize(
    ("name", "objective", "marks", "said"),
    [
        ("sd1", {}, set(), "epsilon"),
        ("sd2", {}, {"v_pred"}, "v"),
        ("sdxl", {}, set(), "epsilon"),
        ("sdxl", {"prediction": "v_prediction"}, {"v_pred"}, "v"),
        ("sdxl", {"prediction": "v_prediction", "zero_terminal_snr": True}, {"v_pred", "ztsnr"}, "v"),
    ],
)
def test_what_was_trained_to_be_predicted_travels_with_the_file(
    name, objective, marks, said, bases, trained, recipe, tmp_path
):
    base = bases[name]
    _, adapter = trained("full", base, select="cross-kv")
    chosen = recipe(adapter={"kind": "full"}, export=FORMATS, model={"path": str(base)}, objective=objective)
    family = load_family(chosen.model, chosen.objective)
    (path,) = export(adapter.weights(), family, chosen, tmp_path / "adapters")
    empty = {key for key, value in load_file(path).items() if value.numel() == 0}
    assert empty == marks
    assert header(path)["modelspec.prediction_type"] == said
    assert verify(path, weights=adapter.weights()).require()
    back = load_family(ModelConfig(path=str(path)))
    assert back.process.prediction == family.objective.prediction
    assert isinstance(back.process, DDPM)
    assert bool(back.scheduler().config.get("rescale_betas_zero_snr")) == ("ztsnr" in marks)


def test_the_header_is_modelspecs(bases, trained, recipe, tmp_path):
    base = bases["sdxl"]
    family, adapter = trained("full", base, select="cross-kv")
    chosen = recipe(adapter={"kind": "full"}, export=FORMATS, model={"path": str(base)})
    (path,) = export(adapter.weights(), family, chosen, tmp_path / "adapters")
    said = header(path)
    assert said["modelspec.sai_model_spec"] == "1.0.1"
    assert said["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
    assert said["modelspec.architecture"] == "stable-diffusion-xl-custom"
    assert said["modelspec.trigger_phrase"] == "zib star"
    assert (said["finetune.base"], said["finetune.layout"]) == (str(base), "single-file")


def test_equal_runs_write_equal_bytes(trained, recipe, tmp_path):
    family, adapter = trained("full", select="cross-kv")
    chosen = recipe(adapter={"kind": "full"}, export=FORMATS)
    one, two = (export(adapter.weights(), family, chosen, tmp_path / name)[0] for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_older_folders_are_written_alike(tiny_sd, trained, tmp_path):
    """With diffusers' former names in the autoencoder, positions and text_model. in the text encoder, and shards."""
    base = Path(shutil.copytree(tiny_sd, tmp_path / "base"))
    file = base / "vae" / "diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for new, old in older.items():
        tensors = {key.replace(new, old): value for key, value in tensors.items()}
    save_file(tensors, file, {"format": "pt"})
    file = base / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(file).items()}
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(24)[None]}, file, {"format": "pt"})
    unet = diffusers.UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    shutil.rmtree(base / "unet")
    unet.save_pretrained(base / "unet", max_shard_size="40KB")
    family, adapter = trained("full", text_encoder=True)
    names, settings = family.export_names, family.scheduler().config
    for folder in (tiny_sd, base):
        out = tmp_path / f"{folder.name}.safetensors"
        write_single_file(adapter.weights(), folder, out, names, torch.float32, {}, settings)
    assert (tmp_path / "base.safetensors").read_bytes() == (tmp_path / f"{tiny_sd.name}.safetensors").read_bytes()


def test_what_cannot_be_written_leaves_no_file(tiny_sd, trained, tmp_path):
    family, adapter = trained("full", select="cross-kv")
    weights, names, settings = adapter.weights(), family.export_names, family.scheduler().config
    key = min(weights.tensors)
    untouched = {name: value for name, value in read(tiny_sd, names).tensors.items() if name in weights.tensors}
    for tensors, said in (
        ({**weights.tensors, "denoiser.nowhere.weight": torch.ones(2)}, "no place"),
        ({**weights.tensors, key: torch.ones(2)}, "in the base model"),
        ({**weights.tensors, key: weights.tensors[key] * float("nan")}, "NaN or infinite"),
        (untouched, "nothing was learned"),
    ):
        with pytest.raises(GuardError, match=said):
            path = tmp_path / "out" / "zib.safetensors"
            write_single_file(replace(weights, tensors=tensors), tiny_sd, path, names, torch.float32, {}, settings)
        assert not path.parent.exists() or not list(path.parent.iterdir())


def test_a_network_that_the_original_code_has_not_is_refused(tiny_sd, trained, tmp_path):
    base = Path(shutil.copytree(tiny_sd, tmp_path / "base"))
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"class_embedding.weight": torch.ones(2, 2)}, file, {"format": "pt"})
    family, adapter = trained("full", select="cross-kv")
    with pytest.raises(UserError, match=r"'class_embedding\.weight' has no place in a single file of Stable Diff"):
        write_single_file(
            adapter.weights(), base, tmp_path / "a.safetensors", family.export_names, torch.float32, {}, {}
        )


def test_a_damaged_file_fails(trained, recipe, tmp_path):
    family, adapter = trained("full", select="cross-kv")
    weights = adapter.weights()
    (path,) = export(weights, family, recipe(adapter={"kind": "full"}, export=FORMATS), tmp_path / "adapters")
    whole, said = load_file(path), header(path)

    def failures(changes):
        tensors = {key: value for key, value in {**whole, **changes}.items() if value is not None}
        save_file(tensors, path, said)
        return [check.name for check in verify(path, weights=weights).checks if not check.passed]

    key = next(key for key in whole if "attn2.to_k" in key)
    assert failures({}) == []
    assert failures({key: None}) == ["keys"]
    assert failures({key: whole[key] + 1}) == ["equal to memory"]
    assert "finite" in failures({"first_stage_model.quant_conv.bias": whole["first_stage_model.quant_conv.bias"] / 0})
    path.write_bytes(path.read_bytes()[:-8])
    assert not verify(path).passed


def test_an_adapter_that_was_trained_on_a_single_file_finds_it_again(tiny_sd, trained, recipe, single_file, tmp_path):
    file = single_file(tiny_sd, name="base.safetensors")
    chosen = recipe(model={"path": str(file), "like": str(tiny_sd)})
    _, adapter = trained("lora")
    family = load_family(chosen.model)
    paths = export(adapter.weights(), family, chosen, tmp_path / "adapters")
    for path in paths:
        assert load_base(identify(path)).folder == family.folder
        assert load_base(identify(path), str(file)).folder == family.folder
    other = single_file(tiny_sd, name="other.safetensors", dtype=torch.float16)
    swapped = load_base(identify(paths[0]), str(other))
    assert swapped.folder != family.folder and layout_of(swapped.folder) is layout_of(tiny_sd)
    assert verify(paths[0]).require() and verify(paths[0], base=str(other)).require()


def test_verify_takes_settings_of_a_named_base(tiny_sd, single_file):
    file = single_file(tiny_sd)
    assert not verify(file).passed, "there is no tokenizer to load it with"
    assert verify(file, base=str(tiny_sd)).require()
