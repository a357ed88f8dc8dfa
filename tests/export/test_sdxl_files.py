"""Files of SDXL: the names of the published code, read by diffusers' own converters."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from published import denoiser, layers_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.config.schema import ModelConfig
from finetune.export import export, kohya, layers, read, verify
from finetune.export.layers import Layer
from finetune.export.metadata import describe, side_file
from finetune.families import load_family, sdxl
from finetune.families.unet import linears
from finetune.family import ExportNames
from finetune.originals import unet
from finetune.randomness import generator

SETTINGS = {"rank": 4, "alpha": 2.0, "targets": "conv", "text_encoder": True}


@pytest.fixture(scope="module")
def tiny_sdxl(tmp_path_factory):
    return sdxl.tiny(tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture
def files(tiny_sdxl, trained, recipe, tmp_path):
    family, adapter = trained(folder=tiny_sdxl, **SETTINGS)
    adapted = recipe(model={"path": str(tiny_sdxl)}, adapter={"kind": "lora", **SETTINGS})
    return family, adapter, export(adapter.weights(), family, adapted, tmp_path)


def test_both_layouts_hold_what_was_trained(files):
    family, adapter, paths = files
    before = layers(adapter.weights())
    for path in paths:
        after = layers(read(path, family.export_names))
        whole = {layer.name: layer for layer in after}
        for layer in before:
            torch.testing.assert_close(whole[layer.name].delta(), layer.delta(), atol=1e-7, rtol=0)
        extra = [layer for name, layer in whole.items() if name not in {one.name for one in before}]
        assert not any(layer.up.any() for layer in extra)
        checks = verify(path, weights=adapter.weights()).require().checks
        assert {"diffusers: every layer arrives", "diffusers: output"} <= {check.name for check in checks}
    assert {"kohya", "comfyui", "a1111"} <= {check.name for check in checks}, "and the tools have a place for each"


def test_kohya_names_are_those_of_the_published_code(files):
    _, _, (_, path) = files
    stems = {key.partition(".")[0] for key in load_file(path)}
    assert {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_4_0_in_layers_2",
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_middle_block_1_proj_in",
        "lora_unet_output_blocks_2_2_conv",
        "lora_unet_output_blocks_3_0_skip_connection",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_1_self_attn_out_proj",
    } <= stems
    assert not [stem for stem in stems if re.search("(down|mid|up)_block", stem)]
    with safe_open(path, "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-xl-custom/lora", (
            "the twin is of no such size"
        )


def test_files_in_diffusers_names_are_read_as_well(files, tmp_path):
    """As OneTrainer and older scripts write them."""
    family, _, (_, path) = files
    called = {place.path.replace(".", "_"): layer.replace(".", "_") for layer, place in _places(family).items()}

    def renamed(key: str) -> str:
        prefix, word = re.fullmatch(r"(lora_\w+?_)(\w+)", key.partition(".")[0]).groups()  # type: ignore[union-attr]
        return prefix + called.get(word, word) + "." + key.partition(".")[2]

    other = tmp_path / "other.safetensors"
    save_file({renamed(key): tensor for key, tensor in load_file(path).items()}, other)
    assert any("lora_unet_down_blocks_1" in key for key in load_file(other))
    one, two = (read(file, family.export_names).tensors for file in (path, other))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def _places(family):
    return family.export_names["denoiser"].places


def test_diffusers_converts_the_published_models_names_back():
    """Every layer of the widest preset, in the real geometry, rank 1."""
    network = denoiser("sdxl")
    names = {"denoiser": ExportNames("unet", "lora_unet", places=unet.places(network.config))}
    patterns = re.compile("|".join(linears(())["conv"]["denoiser"]))
    made = [layer(network, name, rank=1) for name in layers_of(network) if patterns.fullmatch(name)]
    packed = kohya.pack(made, names, torch.float32)
    converted, alphas = StableDiffusionXLPipeline.lora_state_dict(packed, unet_config=network.config)
    assert set(alphas.values()) == {1.0}
    arrived = convert_unet_state_dict_to_peft(
        {key.removeprefix("unet."): tensor for key, tensor in converted.items() if key.startswith("unet.")}
    )
    assert arrived.keys() == {f"{one.module}.lora_{half}.weight" for one in made for half in "AB"}
    for one in made:
        assert torch.equal(arrived[f"{one.module}.lora_B.weight"], one.up)
        assert torch.equal(arrived[f"{one.module}.lora_A.weight"], one.down)


def layer(network, module, rank):
    """A layer of random factors for a module of a network without weights."""
    shape = network.get_submodule(module).weight.shape
    ones = (1,) * (len(shape) - 2)
    down = torch.randn((rank, *shape[1:]), generator=generator(0, module))
    up = torch.randn((shape[0], rank, *ones), generator=generator(1, module))
    return Layer(network="denoiser", module=module, down=down, up=up, alpha=float(rank))


def test_lokr_and_loha_are_merged_by_these_names(tiny_sdxl, recipe, tmp_path):
    """``finetune sample`` has no loader of diffusers' for them."""
    from test_lora_family_files import LOHA, trained

    family, adapter = trained(tiny_sdxl, LOHA)
    adapted = recipe(model={"path": str(tiny_sdxl)}, adapter=LOHA, export={"formats": ["kohya"]})
    (path,) = export(adapter.weights(), family, adapted, tmp_path)
    assert any(key.startswith("lora_unet_input_blocks_4_1_") for key in load_file(path))
    checks = verify(path, weights=adapter.weights()).require().checks
    assert {"comfyui", "a1111", "merged: loads, output"} <= {check.name for check in checks}
    assert Path(path).with_suffix(".json").is_file()


@pytest.mark.parametrize(
    ("family", "width", "architecture", "version", "shelf"),
    [
        ("sdxl", 2048, "stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "SDXL"),
        ("sd", 768, "stable-diffusion-v1", "sd_v1", "SD1"),
        ("sd", 1024, "stable-diffusion-v2", "sd_v2", "SD2"),
        ("sdxl", 32, "stable-diffusion-xl-custom", "", "Other"),
        ("sd", 32, "stable-diffusion-custom", "", "Other"),
    ],
)
def test_headers_call_published_models_by_their_names(
    family, width, architecture, version, shelf, tiny_sd, tiny_sdxl, tmp_path, recipe
):
    """FORMATS 1.6: Forge and A1111 sort their lists by these."""
    base = shutil.copytree(tiny_sdxl if family == "sdxl" else tiny_sd, tmp_path / "base")
    settings = base / "unet" / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "cross_attention_dim": width}))
    loaded = load_family(ModelConfig(path=str(base)))
    adapted = recipe(model={"path": str(base)})
    one = Layer(network="denoiser", module="m", down=torch.ones(1, 2), up=torch.ones(2, 1), alpha=1.0)
    header = describe("kohya", [one], {}, loaded, adapted)
    assert header["modelspec.architecture"] == f"{architecture}/lora"
    assert (header.get("ss_base_model_version", ""), header["ss_v2"]) == (version, str(shelf == "SD2"))
    assert side_file(adapted, loaded)["sd version"] == shelf
