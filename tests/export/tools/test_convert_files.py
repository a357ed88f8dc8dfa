"""Adapters in other layouts and under other trainers' names: the change of every layer stays what it was."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from finetune.adapters import attach
from finetune.config.adapters import AdapterConfig
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.export import export, identify, verify
from finetune.export.read import read_header
from finetune.export.tools.convert import convert
from finetune.export.tools.source import Source
from finetune.families import load_family
from finetune.originals import unet
from finetune.randomness import generator

ORIGINAL = {  # SD's names in the published code, of the tiny model's geometry
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}


def changes(path: Path, base: Path | None = None) -> dict[str, torch.Tensor]:
    """The whole changes of a file's layers by their names, without those that change nothing."""
    source = Source(path, str(base) if base else None)
    found = {name: source.layer(name).delta() for name in source}
    return {name: change for name, change in found.items() if change.any()}


def same(found: dict[str, torch.Tensor], layers: Any, tolerance: float = 0.0) -> None:
    """Every layer has its change, and there is no other."""
    assert found.keys() == {layer.name for layer in layers}
    for layer in layers:
        wanted = layer.delta()
        assert (found[layer.name] - wanted).abs().max() <= tolerance * wanted.abs().max(), layer.name


@pytest.mark.parametrize(("dtype", "lost"), [("float32", 0.0), ("bfloat16", 0.0), ("float16", 2.0**-24)])
def test_there_and_back_is_the_same_file(model, dtype, lost, files, tmp_path):
    """Half of a number below 2 ** -14 has no place in float16, and alpha is half of the rank."""
    _, diffusers, kohya = files(model, dtype)
    for path, to, back in ((kohya, "diffusers", "kohya"), (diffusers, "kohya", "diffusers")):
        convert(path, tmp_path / to / "there.safetensors", to)
        convert(tmp_path / to / "there.safetensors", tmp_path / to / "back.safetensors", back)
        before, after = load_file(path), load_file(tmp_path / to / "back.safetensors")
        zeros = {key for key in after.keys() - before.keys() if key.endswith("lora_B.weight")}
        assert not any(after[key].any() for key in zeros), "kohya's layout has siblings that are zero, and no others"
        assert {key.partition(".lora_")[0] for key in after.keys() - before.keys()} <= {
            key.partition(".lora_")[0] for key in zeros
        }
        for key, tensor in before.items():
            assert (tensor.float() - after[key].float()).abs().max() <= lost and tensor.dtype == after[key].dtype, key


def test_what_is_converted_equals_what_is_exported(model, files, tmp_path):
    _, diffusers, kohya = files(model, targets="conv")
    convert(diffusers, tmp_path / "k.safetensors", "kohya")
    convert(kohya, tmp_path / "d.safetensors", "diffusers")
    assert load_file(tmp_path / "k.safetensors").keys() == load_file(kohya).keys()
    for path in (tmp_path / "k.safetensors", tmp_path / "d.safetensors"):
        assert read_header(path)[1]["modelspec.trigger_phrase"] == "zib star"
        checks = verify(path).require().checks
        assert "diffusers: merged weights" in {check.name for check in checks}, "loaded by diffusers, and right"


def test_an_odd_alpha_is_right_to_the_last_digits_of_float32(files, tiny_sd, tmp_path):
    layers, _, kohya = files(tiny_sd, alpha=3.0, rank=5)
    same(changes(convert(kohya, tmp_path / "d.safetensors", "diffusers")), layers, 1e-6)
    back = convert(tmp_path / "d.safetensors", tmp_path / "k.safetensors", "kohya")
    same(changes(back), layers, 1e-6)
    alphas = {float(tensor) for key, tensor in load_file(back).items() if key.endswith(".alpha")}
    assert alphas == {3.0}, "the header remembers what diffusers' layout has no place for"


def test_other_numbers(files, tiny_sd, tmp_path):
    layers, diffusers, _ = files(tiny_sd)
    path = convert(diffusers, tmp_path / "half.safetensors", "kohya", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    same(changes(path), layers, 1e-2)
    assert not (tmp_path / ".partial").exists() and len(list(tmp_path.glob(".partial*"))) == 0


def test_differences_are_whole(files, tiny_sd, tmp_path):
    layers, diffusers, _ = files(tiny_sd)
    path = convert(diffusers, tmp_path / "whole.safetensors", "difference")
    assert identify(path).layout == "difference"
    found = load_file(path)
    assert len(found) == len(layers)
    for layer in layers:
        level = "text_model_" if layer.network == "text_encoder" else ""
        stem = f"lora_{'te' if level else 'unet'}_{level}{layer.module.replace('.', '_')}"
        torch.testing.assert_close(found[f"{stem}.diff"], layer.delta())
    verify(path).require()


def example_script(key: str) -> str:
    """As diffusers' training scripts wrote before PEFT."""
    return key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")


def attention_processor(key: str) -> str:
    """As older ones did."""
    found = re.fullmatch(r"(unet\..*attn[12])\.to_(q|k|v|out)(?:\.0)?\.lora_([AB])\.weight", key)
    text = {"A": "down", "B": "up"}
    return f"{found[1]}.processor.to_{found[2]}_lora.{text[found[3]]}.weight" if found else example_script(key)


def linear_layer(key: str) -> str:
    """As diffusers' text encoders had it for a time."""
    return key.replace(".lora_A.", ".lora_linear_layer.down.").replace(".lora_B.", ".lora_linear_layer.up.")


def down_and_up(key: str) -> str:
    """Words of one layout, endings of the other."""
    return key.replace(".lora_A.", ".lora_down.").replace(".lora_B.", ".lora_up.")


@pytest.mark.parametrize("spell", [example_script, attention_processor, linear_layer, down_and_up])
def test_spellings_of_diffusers_own(spell, model, files, tmp_path):
    layers, diffusers, _ = files(model)
    renamed = {spell(key): tensor for key, tensor in load_file(diffusers).items()}
    assert not renamed.keys() & load_file(diffusers).keys()
    save_file(renamed, tmp_path / "old.safetensors")
    same(changes(convert(tmp_path / "old.safetensors", tmp_path / "k.safetensors", "kohya", base=str(model))), layers)


def with_alphas(path: Path, layers: Any, names: Any) -> dict[str, torch.Tensor]:
    """Diffusers' keys with the scale not in the numbers but in alphas, as OneTrainer and others write."""
    tensors = {}
    for layer in layers:
        stem = f"{names[layer.network].diffusers}.{names[layer.network].missing_level}{layer.module}"
        tensors |= {f"{stem}.lora_A.weight": layer.down, f"{stem}.lora_B.weight": layer.up}
        tensors[f"{stem}.alpha"] = torch.tensor(layer.alpha)
    return tensors


def test_alphas_beside_diffusers_keys(model, files, tmp_path):
    layers, diffusers, _ = files(model)
    names = load_family(ModelConfig(path=str(model))).export_names
    save_file(with_alphas(diffusers, layers, names), tmp_path / "alphas.safetensors")
    path = convert(tmp_path / "alphas.safetensors", tmp_path / "k.safetensors", "kohya", base=str(model))
    same(changes(path, model), layers)
    assert {float(tensor) for key, tensor in load_file(path).items() if key.endswith(".alpha")} == {2.0}


def test_alpha_in_the_header_that_diffusers_writes(files, tiny_sd, tmp_path):
    layers, _, _ = files(tiny_sd, text_encoder=False)
    names = load_family(ModelConfig(path=str(tiny_sd))).export_names
    tensors = {key: one for key, one in with_alphas(tiny_sd, layers, names).items() if not key.endswith(".alpha")}
    said = json.dumps({"unet.r": 4, "unet.lora_alpha": 2, "unet.alpha_pattern": {}})
    save_file(tensors, tmp_path / "said.safetensors", {"lora_adapter_metadata": said})
    path = convert(tmp_path / "said.safetensors", tmp_path / "d.safetensors", "diffusers", base=str(tiny_sd))
    same(changes(path, tiny_sd), layers)
    assert "lora_adapter_metadata" not in read_header(path)[1], "it would be wrong of the file that was written"


@pytest.mark.parametrize("rslora", [False, True])
def test_folder_of_peft(rslora, files, tiny_sd, tmp_path):
    layers, _, _ = files(tiny_sd)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 2.0, "use_rslora": rslora}
    settings["alpha_pattern"] = {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 8.0}
    for component, network in (("unet", "denoiser"), ("text_encoder", "text_encoder")):
        tensors = {}
        for layer in layers:
            if layer.network == network:
                tensors[f"base_model.model.{layer.module}.lora_A.weight"] = layer.down
                tensors[f"base_model.model.{layer.module}.lora_B.weight"] = layer.up
        (tmp_path / "peft" / component).mkdir(parents=True)
        save_file(tensors, tmp_path / "peft" / component / "adapter_model.safetensors")
        (tmp_path / "peft" / component / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    found = changes(convert(tmp_path / "peft", tmp_path / "d.safetensors", "diffusers", base=str(tiny_sd)), tiny_sd)
    assert found.keys() == {layer.name for layer in layers}
    for layer in layers:
        alpha = 8.0 if layer.module == "mid_block.attentions.0.transformer_blocks.0.attn1.to_q" else 2.0
        scale = alpha / (math.sqrt(4) if rslora else 4)
        torch.testing.assert_close(found[layer.name], layer.delta() / layer.scale * scale)


def test_names_of_comfyui(model, files, tmp_path):
    """``diffusion_model.<path in the published code>.lora_A.weight`` with alphas, as OneTrainer writes for ComfyUI."""
    layers, _, _ = files(model)
    family = load_family(ModelConfig(path=str(model)))
    table = family.export_names["denoiser"].places or unet.places(ORIGINAL)
    encoders = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    tensors = {}
    for layer in layers:
        if layer.network == "denoiser":
            stem = f"diffusion_model.{table[layer.module].path}"
        else:
            level = "" if layer.module.startswith("text_model.") else "text_model."
            stem = f"text_encoders.{encoders[layer.network]}.transformer.{level}{layer.module}"
        tensors |= {f"{stem}.lora_A.weight": layer.down, f"{stem}.lora_B.weight": layer.up}
        tensors[f"{stem}.alpha"] = torch.tensor(layer.alpha)
    save_file(tensors, tmp_path / "comfy.safetensors")
    source = Source(tmp_path / "comfy.safetensors", str(model))
    if model.parent.name.startswith("tiny-sdxl"):
        same({name: source.layer(name).delta() for name in source}, layers)
    else:  # SD's table there is of the published size, so blocks of the tiny one have other numbers
        found = [source.layer(name) for name in source if name.startswith("text_encoder")]
        same({one.name: one.delta() for one in found}, [one for one in layers if one.network == "text_encoder"])
        first = "denoiser.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
        assert torch.equal(source.layer(first).delta(), next(one for one in layers if one.name == first).delta())


def test_kohyas_layout_with_diffusers_names(files, tiny_sdxl, tmp_path):
    """As OneTrainer wrote SDXL for a time."""
    layers, _, kohya = files(tiny_sdxl)
    places = load_family(ModelConfig(path=str(tiny_sdxl))).export_names["denoiser"].places
    words = {place.path.replace(".", "_"): module.replace(".", "_") for module, place in places.items()}
    renamed = {}
    for key, tensor in load_file(kohya).items():
        stem, _, ending = key.partition(".")
        word = stem.removeprefix("lora_unet_")
        renamed[f"lora_unet_{words[word]}.{ending}" if word in words else key] = tensor
    save_file(renamed, tmp_path / "legacy.safetensors")
    path = convert(tmp_path / "legacy.safetensors", tmp_path / "d.safetensors", "diffusers", base=str(tiny_sdxl))
    same(changes(path, tiny_sdxl), layers)


def test_missing_alphas_are_ranks(files, tiny_sd, tmp_path):
    layers, _, kohya = files(tiny_sd)
    save_file({k: one for k, one in load_file(kohya).items() if not k.endswith(".alpha")}, tmp_path / "a.safetensors")
    found = changes(convert(tmp_path / "a.safetensors", tmp_path / "d.safetensors", "diffusers", base=str(tiny_sd)))
    for layer in layers:
        torch.testing.assert_close(found[layer.name], layer.delta() / layer.scale)


def test_differing_alphas_become_one(files, tiny_sd, tmp_path):
    _, _, kohya = files(tiny_sd)
    tensors = load_file(kohya)
    some = [key for key in sorted(tensors) if key.endswith(".alpha")][:5]
    for key in some:
        tensors[key] *= 2
    save_file(tensors, tmp_path / "a.safetensors")
    before = changes(tmp_path / "a.safetensors", tiny_sd)
    path = convert(tmp_path / "a.safetensors", tmp_path / "k.safetensors", "kohya", base=str(tiny_sd))
    after = changes(path, tiny_sd)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len({float(one) for key, one in load_file(path).items() if key.endswith(".alpha")}) == 1


def test_a_middle_factor_is_multiplied_in(tiny_sd, tmp_path):
    """LoCon of LyCORIS with Tucker's decomposition, against three convolutions one after the other."""
    draw = generator(0, "tucker")
    down, mid = torch.randn(3, 16, 1, 1, generator=draw), torch.randn(3, 3, 3, 3, generator=draw)
    up = torch.randn(16, 3, 1, 1, generator=draw)
    stem = "lora_unet_mid_block_resnets_0_conv1"
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(6.0)}
    save_file({f"{stem}.{part}": tensor for part, tensor in parts.items()}, tmp_path / "locon.safetensors")
    path = convert(tmp_path / "locon.safetensors", tmp_path / "d.safetensors", "diffusers", base=str(tiny_sd))
    change = changes(path, tiny_sd)["denoiser.mid_block.resnets.0.conv1"]
    x = torch.randn(2, 16, 5, 5, generator=draw)
    inner = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down), mid, padding=1)
    wanted = 6.0 / 3 * torch.nn.functional.conv2d(inner, up)
    torch.testing.assert_close(torch.nn.functional.conv2d(x, change, padding=1), wanted, rtol=1e-4, atol=1e-4)


def test_dora_of_lycoris_along_outputs(files, tiny_sd, tmp_path):
    """``dora_scale`` of shape [out, 1, ...] are PEFT's lengths; those of inputs have no place and are refused."""
    layers, diffusers, _ = files(tiny_sd, use_dora=True)
    tensors = {}
    for layer in layers:
        level = "text_model_" if layer.network == "text_encoder" else ""
        stem = f"lora_{'te' if level else 'unet'}_{level}{layer.module.replace('.', '_')}"
        lengths = layer.magnitude.view(-1, *[1] * (layer.up.ndim - 1))
        tensors |= {f"{stem}.lora_down.weight": layer.down, f"{stem}.lora_up.weight": layer.up}
        tensors |= {f"{stem}.alpha": torch.tensor(layer.alpha), f"{stem}.dora_scale": lengths}
    save_file(tensors, tmp_path / "dora.safetensors")
    path = convert(tmp_path / "dora.safetensors", tmp_path / "d.safetensors", "diffusers", base=str(tiny_sd))
    wanted, found = load_file(diffusers), load_file(path)
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[key], found[key]) for key in wanted)
    with pytest.raises(UserError, match="lengths"):
        convert(path, tmp_path / "k.safetensors", "kohya", base=str(tiny_sd))
    whole = convert(path, tmp_path / "whole.safetensors", "difference", base=str(tiny_sd))
    verify(whole, str(tiny_sd)).require()
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors[f"{stem}.dora_scale"] = torch.ones(1, 16)
    save_file(tensors, tmp_path / "inputs.safetensors")
    with pytest.raises(UserError, match=r"lengths of inputs.*16 outputs"):
        convert(tmp_path / "inputs.safetensors", tmp_path / "no.safetensors", "diffusers", base=str(tiny_sd))
    assert not (tmp_path / "no.safetensors").exists()


@pytest.mark.parametrize("settings", [{"kind": "loha", "rank": 2}, {"kind": "lokr", "rank": 4}, {"kind": "lokr"}])
def test_lycoris_there_and_back(settings, tiny_sd, recipe, tmp_path):
    adapter = {"rank": 1, "alpha": 4.0, **settings}
    family = load_family(ModelConfig(path=str(tiny_sd)))
    attached: Any = attach(TypeAdapter(AdapterConfig).validate_python(adapter), family, seed=0)
    with torch.no_grad():
        for group in attached.groups():
            for name, parameter in group.parameters.items():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator(1, name))
    peft, kohya = export(attached.weights(), family, recipe(adapter=adapter), tmp_path)
    there = convert(peft, tmp_path / "there.safetensors", "kohya")
    assert all(torch.equal(one, load_file(there)[key]) for key, one in load_file(kohya).items())
    back = convert(there, tmp_path / "back.safetensors", "peft")
    for key, tensor in load_file(peft).items():
        torch.testing.assert_close(load_file(back)[key], tensor, rtol=1e-6, atol=0)
    verify(there).require()
    with pytest.raises(UserError, match="no layout 'diffusers' of a lycoris"):
        convert(peft, tmp_path / "no.safetensors", "diffusers")


def test_words_of_a_file_and_a_pickle(tmp_path):
    rows = torch.randn(3, 16, generator=generator(0, "rows"))
    save_file({"<zib>": rows}, tmp_path / "learned_embeds.safetensors")
    there = convert(tmp_path / "learned_embeds.safetensors", tmp_path / "zib.pt", "a1111")
    back = convert(there, tmp_path / "back.safetensors", "diffusers")
    assert torch.equal(load_file(back)["<zib>"], rows)
    for to, name, words in (
        ("a1111", "zib.bin", r"\.safetensors or \.pt"),
        ("diffusers", "no.pt", r"\.safetensors, not"),
    ):
        with pytest.raises(UserError, match=rf"layout {to} is written as {words}"):
            convert(there, tmp_path / name, to)


def test_without_the_base_the_names_are_those_of_the_published_model(tmp_path):
    """A file that says nothing of its base, for a model that is not here: its layers tell."""
    stem = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"
    factors = {f"{stem}.lora_A.weight": torch.randn(2, 2048), f"{stem}.lora_B.weight": torch.randn(640, 2)}
    save_file(factors, tmp_path / "xl.safetensors")
    path = convert(tmp_path / "xl.safetensors", tmp_path / "k.safetensors", "kohya")
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"
    assert load_file(path).keys() == {f"{stem}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    back = load_file(convert(path, tmp_path / "back.safetensors", "diffusers"))
    assert all(torch.equal(factors[key], back[key]) for key in factors) and back.keys() == factors.keys()


def test_flux_there_and_back_through_fused_layers(tmp_path):
    draw = generator(0, "flux")
    tensors = {}
    for part in "qkv":
        stem = f"transformer.transformer_blocks.0.attn.to_{part}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(2, 3072, generator=draw)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(3072, 2, generator=draw)
    stem = "transformer.single_transformer_blocks.0.proj_mlp"
    tensors[f"{stem}.lora_A.weight"] = torch.randn(2, 3072, generator=draw)
    tensors[f"{stem}.lora_B.weight"] = torch.randn(12288, 2, generator=draw)
    save_file(tensors, tmp_path / "flux.safetensors")
    there = convert(tmp_path / "flux.safetensors", tmp_path / "k.safetensors", "kohya")
    assert "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight" in load_file(there)
    back = load_file(convert(there, tmp_path / "back.safetensors", "diffusers"))
    assert back.keys() == tensors.keys() and all(torch.equal(tensors[key], back[key]) for key in tensors)


def test_what_cannot_be_is_said(files, tiny_sd, tmp_path):
    _, diffusers, kohya = files(tiny_sd)
    with pytest.raises(UserError, match="did you mean 'kohya'"):
        convert(diffusers, tmp_path / "k.safetensors", "kohyah")
    with pytest.raises(UserError, match="not overwritten"):
        convert(diffusers, kohya, "kohya")
    with pytest.raises(UserError, match="float64"):
        convert(diffusers, tmp_path / "k.safetensors", "kohya", dtype="float64")
    tensors = load_file(kohya)
    odd = next(key for key in sorted(tensors) if key.endswith("lora_up.weight"))
    broken = {
        "lacks its partner": {
            key: one for key, one in tensors.items() if not key.endswith("attn1_to_q.lora_up.weight")
        },
        "no key of a low-rank adapter": {**tensors, "global_step": torch.tensor(3.0)},
        "is a new word": {**tensors, "bundle_emb.zib.string_to_param.*": torch.ones(1, 16)},
        "NaN or infinite": {**tensors, odd: torch.full_like(tensors[odd], math.nan)},
        "alpha is 0.0": {**tensors, min(tensors): torch.tensor(0.0)},
        "holds low-rank factors": {**tensors, "lora_unet_conv_in.diff": torch.ones(16, 4, 3, 3)},
        "networks are called": {**tensors, "lora_te3_encoder_block_0.lora_down.weight": torch.ones(1, 1)},
    }
    for number, (words, one) in enumerate(broken.items()):
        path = tmp_path / f"broken-{number}.safetensors"
        save_file(one, path, read_header(kohya)[1])
        with pytest.raises(UserError, match=words):
            convert(path, tmp_path / "no.safetensors", "diffusers")
    save_file(tensors, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="name the model with --base"):
        convert(tmp_path / "foreign.safetensors", tmp_path / "no.safetensors", "diffusers")
    assert not list(tmp_path.glob("no*")) and not list(tmp_path.glob(".partial*"))
