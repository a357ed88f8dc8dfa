"""The names of the published code for every layer of the published models."""

from __future__ import annotations

import re

import pytest
from published import DENOISERS, clip, denoiser, layers_of

from finetune.export import readers
from finetune.export.names import Stems, fuses, network_of
from finetune.families.unet import linears
from finetune.family import ExportNames
from finetune.originals import unet
from finetune.originals.tables import TABLES


def names_of(model: str) -> dict[str, ExportNames]:
    network = denoiser(model)
    table = {} if model == "sd1" else TABLES[type(network).__name__](network.config)
    return {"denoiser": ExportNames("unet", "lora_unet", places=table)}


@pytest.mark.parametrize("model", DENOISERS)
def test_every_layer_has_one_place_of_its_own(model):
    network = denoiser(model)
    table = TABLES[type(network).__name__](network.config)
    places = [table[layer] for layer in layers_of(network)]
    assert len(set(places)) == len(places)
    taken: dict[str, list[tuple[int, int, int]]] = {}
    for place in places:
        taken.setdefault(place.path, []).append((place.first, place.first + place.share, place.of))
    for path, spans in taken.items():
        ends = [0, *(end for _, end, _ in sorted(spans))]
        assert [start for start, _, _ in sorted(spans)] == ends[:-1], f"{path} has a gap"
        assert {of for _, _, of in spans} == {ends[-1]}, f"{path} is not filled"


@pytest.mark.parametrize("model", DENOISERS)
def test_stems_read_back(model):
    (called,) = names_of(model).values()
    stems = Stems(called)
    for layer in layers_of(denoiser(model)):
        stem, place = stems.of(layer)
        assert re.fullmatch(r"lora_unet_\w+", stem) and stems.layers(stem)[layer] == place
        assert stems.layers("lora_unet_" + layer.replace(".", "_")).keys() >= {layer}, "and under diffusers' names"


@pytest.mark.parametrize("model", ["flux", "sd3", "sd3.5-large", "sd3.5-medium"])
def test_shares_are_what_the_layers_have_outputs(model):
    network = denoiser(model)
    table = TABLES[type(network).__name__](network.config)
    heights: dict[str, set[float]] = {}
    for layer in layers_of(network):
        place = table[layer]
        heights.setdefault(place.path, set()).add(network.get_submodule(layer).weight.shape[0] / place.share)
    assert all(len(found) == 1 for found in heights.values())


@pytest.mark.parametrize(
    ("model", "path", "shape"),
    [
        ("flux", "double_blocks.18.img_attn.qkv", [9216, 3072]),
        ("flux", "double_blocks.0.txt_mlp.0", [12288, 3072]),
        ("flux", "double_blocks.0.txt_mod.lin", [18432, 3072]),
        ("flux", "single_blocks.37.linear1", [21504, 3072]),
        ("flux", "single_blocks.0.linear2", [3072, 15360]),
        ("flux", "single_blocks.0.modulation.lin", [9216, 3072]),
        ("flux", "guidance_in.out_layer", [3072, 3072]),
        ("sd3", "joint_blocks.23.context_block.attn.qkv", [4608, 1536]),
        ("sd3", "joint_blocks.23.context_block.adaLN_modulation.1", [3072, 1536]),
        ("sd3", "joint_blocks.22.context_block.adaLN_modulation.1", [9216, 1536]),
        ("sd3.5-medium", "joint_blocks.12.x_block.attn2.qkv", [4608, 1536]),
        ("sd3.5-medium", "joint_blocks.12.x_block.adaLN_modulation.1", [13824, 1536]),
        ("sd3.5-large", "joint_blocks.37.x_block.mlp.fc2", [2432, 9728]),
    ],
)
def test_shapes_of_the_published_weights(model, path, shape):
    """FORMATS 1.3."""
    network = denoiser(model)
    table = TABLES[type(network).__name__](network.config)
    weights = [network.get_submodule(layer).weight for layer in layers_of(network) if table[layer].path == path]
    assert [sum(weight.shape[0] for weight in weights), weights[0].shape[1]] == shape


def test_the_last_block_of_sd3_makes_nothing_of_the_prompt():
    called = names_of("sd3")["denoiser"]
    last = {place.path for place in called.places.values() if place.path.startswith("joint_blocks.23.context_block")}
    assert {path.rsplit("context_block.")[1] for path in last} == {
        "attn.qkv",
        "attn.ln_q",
        "attn.ln_k",
        "adaLN_modulation.1",
    }
    swapped = {layer for layer, place in called.places.items() if place.swapped}
    assert swapped == {"norm_out.linear", "transformer_blocks.23.norm1_context.linear"}


def test_only_3_5_medium_has_a_second_attention():
    counts = {}
    for model in ("sd3", "sd3.5-large", "sd3.5-medium"):
        paths = {place.path for place in names_of(model)["denoiser"].places.values()}
        counts[model] = sum(".attn2.qkv" in path for path in paths)
    assert counts == {"sd3": 0, "sd3.5-large": 0, "sd3.5-medium": 13}


def test_kohya_knows_722_layers_of_sdxl_and_72_and_192_of_its_text_encoders():
    """FORMATS 1.3."""
    networks = {"denoiser": denoiser("sdxl"), "text_encoder": clip(768, 12), "text_encoder_2": clip(1280, 32, True)}
    names = {
        **names_of("sdxl"),
        "text_encoder": ExportNames("text_encoder", "lora_te1", "text_model."),
        "text_encoder_2": ExportNames("text_encoder_2", "lora_te2"),
    }
    known = readers.kohya(networks, names)
    prefix = {network: f"{called.kohya}_" for network, called in names.items()}
    original = [stem for stem in known if re.match(r"lora_unet_(input|middle|output)_block", stem)]
    wide = re.compile("|".join(linears(())["wide"]["denoiser"]))
    assert sum(wide.fullmatch(known[stem].removeprefix("denoiser.")) is not None for stem in original) == 722
    for network, count in (("text_encoder", 72), ("text_encoder_2", 192)):
        stems = [stem for stem in known if stem.startswith(prefix[network])]
        assert len(stems) == count and all(stem.startswith(f"{prefix[network]}text_model_encoder") for stem in stems)
        assert {network_of(stem, names) for stem in stems} == {network}


@pytest.mark.parametrize("tool", readers.TOOLS)
def test_every_tool_has_a_place_for_what_presets_adapt_in_sdxl(tool):
    network, names = denoiser("sdxl"), names_of("sdxl")
    stems, known = Stems(names["denoiser"]), readers.TOOLS[tool]({"denoiser": network}, names)
    patterns = linears(())["conv"]["denoiser"]
    layers = [layer for layer in layers_of(network) if any(re.fullmatch(pattern, layer) for pattern in patterns)]
    assert len(layers) == 788
    for layer in layers:
        assert known[stems.of(layer)[0]] == f"denoiser.{layer}"
    assert readers.standard_geometry(network) and not fuses(names)


def test_a1111_loses_one_layer_of_sdxl_under_diffusers_names():
    """FORMATS 0: ``up_blocks_0_upsamplers_0_conv``."""
    network, names = denoiser("sdxl"), names_of("sdxl")
    patterns = linears(())["conv"]["denoiser"]
    layers = [layer for layer in layers_of(network) if any(re.fullmatch(pattern, layer) for pattern in patterns)]
    known = readers.a1111({"denoiser": network}, names)
    lost = [layer for layer in layers if "lora_unet_" + layer.replace(".", "_") not in known]
    assert lost == ["up_blocks.0.upsamplers.0.conv"]


@pytest.mark.parametrize("tool", ["kohya", "comfyui"])
@pytest.mark.parametrize("model", ["flux", "sd3", "sd3.5-large", "sd3.5-medium"])
def test_tools_have_a_place_for_every_layer_in_a_transformers_blocks(model, tool):
    network, names = denoiser(model), names_of(model)
    stems, known = Stems(names["denoiser"]), readers.TOOLS[tool]({"denoiser": network}, names)
    inside = [layer for layer in layers_of(network) if re.match(r"(single_)?transformer_blocks\.", layer)]
    assert inside and {stems.of(layer)[0] for layer in inside} <= known.keys()
    assert not readers.a1111({"denoiser": network}, names)
    assert fuses(names) and readers.standard_geometry(network)


def test_settings_that_leave_everything_out_are_those_of_sd_1():
    assert unet.places({}) == unet.places(denoiser("sd1").config)
