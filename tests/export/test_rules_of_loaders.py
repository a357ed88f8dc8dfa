"""What real loaders do with files, rule by rule (FORMATS 0 to 3), on every family that has such files."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from finetune import formats
from finetune.adapter import Weights
from finetune.errors import GuardError, UserError
from finetune.export import export, layers, verify
from finetune.export.check_bundle import READERS as BUNDLE
from finetune.export.kohya import pack
from finetune.export.layers import Layer, weights_of
from finetune.export.pickles import check_archive
from finetune.export.read import FORMATS, identify, read, read_header, read_pickle, read_tensors
from finetune.families import families
from finetune.files import write_tensors
from finetune.hypernet import Structure

KOHYA = ("sd", "sdxl", "flux", "sd3")
"""Families whose files have kohya's layout; those that get one later are found by the first test."""
FUSED = ("flux", "sd3")


class Made(NamedTuple):
    family: Any
    layers: list[Layer]
    weights: Weights
    recipe: Any


@pytest.fixture(scope="module")
def lora(twins: Callable[[str], Path]) -> Callable[[str], Made]:
    """A LoRA whose layers differ in rank and in scale, text encoders included."""
    held: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in held:
            family, adapter, recipe = formats.made(twins(name), "lora")
            found = [
                replace(one, down=one.down[: 1 + place % 3], up=one.up[:, : 1 + place % 3], alpha=0.5 + place % 4)
                for place, one in enumerate(layers(adapter.weights()))
            ]
            held[name] = Made(family, found, weights_of(found, adapter.weights().settings), recipe)
        return held[name]

    return make


def clips(family: Any) -> dict[str, Any]:
    """What files call the CLIP text encoders of a family."""
    return {name: family.export_names[name] for name, part in family.parts.items() if "CLIPText" in part.kind}


def written(made: Made, layout: str, folder: Path, weights: Weights | None = None) -> Path:
    (path,) = export(weights or made.weights, made.family, formats.asking(made.recipe, layout), folder)
    return path


def damaged(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors, (_, header) = read_tensors(path), read_header(path)
    change(tensors)
    write_tensors(path, tensors, header)
    return path


def test_families_with_kohyas_names_are_those_that_these_rules_are_asked_of(twins: Callable[[str], Path]) -> None:
    loaded = {name: formats.load_family(formats.ModelConfig(path=str(twins(name)))) for name in families()}
    assert set(KOHYA) <= {name for name, family in loaded.items() if family.export_names["denoiser"].kohya}


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_one_alpha_in_a_kohya_file_whatever_the_ranks_and_scales(name: str, lora: Any, tmp_path: Path) -> None:
    made = lora(name)
    assert len({one.rank for one in made.layers}) == 3 and len({one.alpha for one in made.layers}) == 4
    path = written(made, "kohya", tmp_path)
    stated = {float(value) for key, value in read_tensors(path).items() if key.endswith(".alpha")}
    assert len(stated) == 1
    back = {one.name: one for one in layers(read(path, made.family.export_names))}
    for one in made.layers:
        torch.testing.assert_close(back[one.name].delta(), one.delta(), rtol=1e-6, atol=1e-7)
    key = next(key for key in read_tensors(path) if key.endswith(".alpha"))
    broken = damaged(path, lambda tensors: tensors[key].mul_(2))
    with pytest.raises(GuardError, match="alpha"):
        verify(broken).require()


@pytest.mark.parametrize("name", FUSED)
def test_alpha_is_the_rank_where_layers_are_fused(name: str, lora: Any, tmp_path: Path) -> None:
    tensors = read_tensors(written(lora(name), "kohya", tmp_path))
    for key in (key for key in tensors if key.endswith(".alpha")):
        assert float(tensors[key]) == len(tensors[key.replace(".alpha", ".lora_down.weight")])


@pytest.mark.parametrize("name", KOHYA)
def test_all_four_text_encoder_projections_with_zeros_where_untrained(name: str, lora: Any) -> None:
    made = lora(name)
    kept = [one for one in made.layers if not one.module.endswith(("k_proj", "out_proj"))]
    tensors = pack(kept, made.family.export_names, torch.float32)
    stems = {key.split(".")[0] for key in tensors if "self_attn" in key}
    assert stems
    for stem in stems:
        start = stem.rsplit("_self_attn_", 1)[0]
        ups = {part: tensors[f"{start}_self_attn_{part}_proj.lora_up.weight"] for part in ("q", "k", "v", "out")}
        assert ups["q"].any() and ups["v"].any() and not ups["k"].any() and not ups["out"].any()
        assert f"{start}_self_attn_k_proj.alpha" in tensors


@pytest.mark.parametrize("name", KOHYA)
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_text_model_in_every_text_encoder_key(name: str, layout: str, lora: Any, tmp_path: Path) -> None:
    made = lora(name)
    keys = read_tensors(written(made, layout, tmp_path)).keys()
    for called in clips(made.family).values():
        start = f"{called.kohya}_" if layout == "kohya" else f"{called.diffusers}."
        level = "text_model_" if layout == "kohya" else "text_model."
        own = [key for key in keys if key.startswith(start)]
        assert own and all(key.removeprefix(start).startswith(level) for key in own)


@pytest.mark.parametrize("name", KOHYA)
def test_text_model_in_every_text_encoder_folder_and_delta(
    name: str, twins: Callable[[str], Path], tmp_path: Path
) -> None:
    family, adapter, recipe = formats.made(twins(name), "full")
    if not family.sites.text_encoders:
        pytest.skip("no text encoder of it trains")
    for chosen in ("diffusers", "delta"):
        (path,) = export(adapter.weights(), family, formats.asking(recipe, chosen), tmp_path / chosen)
        for called in clips(family).values():
            if chosen == "delta":
                keys = [
                    key.removeprefix(f"{called.diffusers}.")
                    for key in read_tensors(path)
                    if key.startswith(f"{called.diffusers}.")
                ]
            else:
                keys = [key for file in (path / called.diffusers).glob("*.safetensors") for key in read_tensors(file)]
            assert keys and all(key.startswith(("text_model.", "text_projection.")) for key in keys)


@pytest.mark.parametrize("name", families())
def test_alpha_is_folded_into_peft_files(name: str, lora: Any, tmp_path: Path) -> None:
    """diffusers takes the rank for alpha, and refuses a key without "lora"."""
    made = lora(name)
    path = written(made, "diffusers", tmp_path)
    keys, header = read_header(path)
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
    assert "lora_adapter_metadata" not in header
    tensors, names = read_tensors(path), made.family.export_names
    for one in made.layers:
        called = names[one.network]
        key = f"{called.diffusers}.{called.missing_level}{one.module}"
        assert torch.equal(tensors[f"{key}.lora_B.weight"], one.up * one.scale)
        assert torch.equal(tensors[f"{key}.lora_A.weight"], one.down)


def test_sdxl_has_the_names_of_the_published_code(lora: Any, tmp_path: Path) -> None:
    keys = [key for key in read_tensors(written(lora("sdxl"), "kohya", tmp_path)) if key.startswith("lora_unet_")]
    assert keys and all(re.match(r"lora_unet_(input_blocks|middle_block|output_blocks)_", key) for key in keys)


@pytest.mark.parametrize("name", FUSED)
def test_fused_queries_keys_and_values_lose_nothing(name: str, lora: Any, tmp_path: Path) -> None:
    made = lora(name)
    path = written(made, "kohya", tmp_path)
    assert any(re.search(r"attn_qkv\.lora_up", key) for key in read_tensors(path))
    assert not any(re.search(r"to_[qkv]\b|_to_[qkv]\.", key) for key in read_tensors(path))
    back = {one.name: one for one in layers(read(path, made.family.export_names))}
    for one in made.layers:
        assert torch.equal(back[one.name].down, one.down), one.name
        torch.testing.assert_close(back[one.name].up * back[one.name].scale, one.up * one.scale, rtol=0, atol=0)


@pytest.mark.parametrize("name", KOHYA)
def test_dora_is_written_where_its_axis_is_read_and_never_as_dora_scale(
    name: str, twins: Callable[[str], Path], tmp_path: Path
) -> None:
    """PEFT's lengths are of outputs, for which ComfyUI and Forge divide by the wrong norm and A1111 reads inputs."""
    family, adapter, recipe = formats.made(twins(name), "dora")
    files = {layout: path for layout, _, path in formats.written([adapter.weights()], family, recipe, tmp_path)}
    assert set(files) == {"diffusers", "difference"}
    lengths = [key for key in read_tensors(files["diffusers"]) if "magnitude" in key]
    assert lengths and all(key.endswith(".lora_magnitude_vector.weight") for key in lengths)
    assert all(key.endswith(".diff") for key in read_tensors(files["difference"]))


@pytest.mark.parametrize("activation", ["linear", "relu", "swish", "mish"])
def test_hypernetworks_have_settings_that_comfyui_reads_the_same_way(
    activation: str, twins: Callable[[str], Path], tmp_path: Path
) -> None:
    """It knows no activation None, leaves dropout on, and builds layers in the order of the keys."""
    family, _, recipe = formats.made(twins("sd"), "hypernetwork")
    structure = Structure(layers=(1, 2, 2, 1), activation=activation, dropout=(0.0, 0.3, 0.3, 0.0))
    section = {"kind": "hypernetwork", "layers": [1, 2, 2, 1], "activation": activation, "dropout": [0, 0.3, 0.3, 0]}
    recipe = type(recipe).model_validate({**recipe.model_dump(mode="json"), "adapter": section})
    from finetune.adapters import attach

    attached = attach(recipe.adapter, formats.load_family(recipe.model), 0)
    with torch.no_grad():
        next(iter(attached.groups()[0].parameters.values())).add_(0.1)
    (path,) = export(attached.weights(), family, formats.asking(recipe, "a1111"), tmp_path)
    held = read_pickle(path)
    assert held["activation_func"] == structure.activation
    assert held["use_dropout"] is False and not any(held["dropout_structure"])
    for width in (key for key in held if isinstance(key, int)):
        for part in held[width]:
            places = [(int(key.split(".")[1]), key.split(".")[2]) for key in part]
            assert places == sorted(places, key=lambda place: (place[0], place[1] == "bias"))
            step = 1 if activation == "linear" else 2
            assert [place for place, what in places if what == "weight"] == [0, step, 2 * step]


@pytest.mark.parametrize("method", ["embedding", "hypernetwork"])
def test_pt_archives_have_no_entry_that_a1111s_checker_refuses(
    method: str, twins: Callable[[str], Path], tmp_path: Path
) -> None:
    family, adapter, recipe = formats.made(twins("sd"), method)
    paths = export(adapter.weights(), family, formats.asking(recipe, "a1111"), tmp_path)
    (path,) = [path for path in paths if path.suffix == ".pt"]
    with zipfile.ZipFile(path) as archive:
        inside = {name.partition("/")[2] for name in archive.namelist()}
    assert all(re.fullmatch(r"data\.pkl|version|data/\d+", name) for name in inside)
    torch.save(read_pickle(path), tmp_path / "plain.pt")
    with pytest.raises(GuardError, match=r"byteorder|format_version|storage_alignment|serialization_id"):
        check_archive(tmp_path / "plain.pt")


@pytest.mark.parametrize("name", KOHYA)
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_no_key_that_a_target_leaves_unread(name: str, layout: str, lora: Any, tmp_path: Path) -> None:
    """Forge refuses a file for a dozen of them, diffusers for one."""
    made = lora(name)
    path = written(made, layout, tmp_path)
    found = verify(path)
    found.require()
    tools = [tool for tool in FORMATS[layout].readers if tool not in made.family.export_names["denoiser"].unread_by]
    asked = " ".join(check.name for check in found.checks)
    assert all(tool in asked for tool in tools)
    stray = next(iter(read_tensors(path).values())).clone()
    broken = damaged(path, lambda tensors: tensors.update({"notes.weight": stray}))
    with pytest.raises((GuardError, UserError), match="notes"):
        verify(broken).require()


def test_words_in_a_lora_are_for_a1111_alone(twins: Callable[[str], Path], tmp_path: Path) -> None:
    """diffusers refuses such a file; so it lies beside the separate ones and is never the only one unasked."""
    family, adapter, recipe = formats.made(twins("sd"), "pivotal")
    files = [path for part in adapter.parts() for path in export(part.weights(), family, recipe, tmp_path)]
    assert [identify(path).kind for path in files].count("pivotal") == 1 < len(files)
    assert "a1111" in BUNDLE
    assert not [
        path for path in files if identify(path).kind == "lora" and "bundle_emb" in json.dumps(read_header(path)[0])
    ]
