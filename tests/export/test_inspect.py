"""What ``finetune inspect`` says of files, of this toolkit and of others."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from finetune.cli import app
from finetune.errors import UserError
from finetune.export import export, layers
from finetune.export.inspect import inspect
from finetune.export.keys import parse
from finetune.randomness import generator


def tensor(*shape):
    return torch.randn(shape, generator=generator(0, str(shape)))


def pair(stem, inputs, outputs, rank=4, alpha=None, down=".lora_down.weight", up=".lora_up.weight"):
    """The keys of one linear layer."""
    held = {stem + down: tensor(rank, inputs), stem + up: tensor(outputs, rank)}
    return held | ({f"{stem}.alpha": torch.tensor(float(alpha))} if alpha is not None else {})


def peft(stem, inputs, outputs, **more):
    return pair(stem, inputs, outputs, down=".lora_A.weight", up=".lora_B.weight", **more)


ATTENTION = "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
DOTTED = ATTENTION.replace("_blocks_", "_blocks.").replace("_attn", ".attn").replace("_to", ".to")
FOREIGN = {
    "kohya sd1": (pair(f"lora_unet_{ATTENTION}", 768, 320, alpha=2), "kohya", "Stable Diffusion 1", "diffusers"),
    "kohya sd2": (pair(f"lora_unet_{ATTENTION}", 1024, 320, alpha=2), "kohya", "Stable Diffusion 2", "diffusers"),
    "kohya sdxl": (
        pair("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048, 640, alpha=2),
        "kohya",
        "Stable Diffusion XL",
        "original",
    ),
    "onetrainer sdxl": (
        pair(f"lora_unet_{ATTENTION}", 2048, 640, alpha=2),
        "kohya",
        "Stable Diffusion XL",
        "diffusers",
    ),
    "sdxl, text alone": (
        pair("lora_te2_text_model_encoder_layers_3_mlp_fc1", 1280, 5120, alpha=2),
        "kohya",
        "Stable Diffusion XL",
        None,
    ),
    "kohya flux": (
        pair("lora_unet_double_blocks_0_img_attn_qkv", 3072, 9216, alpha=2)
        | pair("lora_unet_single_blocks_37_linear1", 3072, 21504, alpha=2),
        "kohya",
        "FLUX.1",
        "original",
    ),
    "kohya flux2": (pair("lora_unet_single_blocks_3_linear1", 64, 9 * 64, alpha=2), "kohya", "FLUX.2", "original"),
    "onetrainer flux": (
        pair("lora_transformer_single_transformer_blocks_0_attn_to_q", 3072, 3072, alpha=4),
        "kohya",
        "FLUX.1",
        "diffusers",
    ),
    "ai-toolkit flux": (
        peft("transformer.single_transformer_blocks.0.attn.to_q", 3072, 3072),
        "diffusers",
        "FLUX.1",
        "diffusers",
    ),
    "kohya sd3": (
        pair("lora_unet_joint_blocks_23_context_block_attn_qkv", 1536, 4608, alpha=2),
        "kohya",
        "Stable Diffusion 3 or 3.5",
        "original",
    ),
    "diffusers sd3": (
        peft("transformer.transformer_blocks.0.attn.to_q", 1536, 1536),
        "diffusers",
        "Stable Diffusion 3 or 3.5",
        "diffusers",
    ),
    "diffusers qwen": (
        peft("transformer.transformer_blocks.59.attn.to_q", 3072, 3072),
        "diffusers",
        "Qwen-Image",
        "diffusers",
    ),
    "diffusers z-image": (peft("transformer.layers.0.attention.to_q", 3840, 3840), "diffusers", "Z-Image", None),
    "diffusers lumina": (
        peft("transformer.noise_refiner.0.attn.to_q", 2304, 2304),
        "diffusers",
        "Lumina-Image 2.0",
        None,
    ),
    "diffusers sana": (
        peft("transformer.transformer_blocks.0.attn1.to_q", 2240, 2240),
        "diffusers",
        "Sana",
        "diffusers",
    ),
    "diffusers pixart": (
        peft("transformer.transformer_blocks.0.attn1.to_q", 1152, 1152),
        "diffusers",
        None,
        "diffusers",
    ),
    "simpletuner": (
        {"lycoris_single_transformer_blocks_0_attn_to_q.lokr_w1": tensor(4, 4)}
        | {"lycoris_single_transformer_blocks_0_attn_to_q.lokr_w2": tensor(8, 8)},
        "kohya",
        "FLUX.1",
        "diffusers",
    ),
    "comfyui": (
        peft("diffusion_model.double_blocks.0.img_attn.qkv", 3072, 9216, alpha=2)
        | peft("text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj", 768, 768, alpha=2),
        "comfyui",
        "FLUX.1",
        "original",
    ),
    "old diffusers": (
        pair(
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k",
            768,
            320,
            down="_lora.down.weight",
            up="_lora.up.weight",
        ),
        "before peft",
        "Stable Diffusion 1",
        "diffusers",
    ),
    "peft folder": (peft(f"base_model.model.{DOTTED}", 768, 320), "peft", "Stable Diffusion 1", "diffusers"),
}


@pytest.mark.parametrize(("tensors", "layout", "family", "names"), FOREIGN.values(), ids=FOREIGN)
def test_files_of_other_trainers_are_told(tensors, layout, family, names, tmp_path):
    save_file(tensors, tmp_path / "it.safetensors")
    found = inspect(tmp_path / "it.safetensors")
    assert (found.layout, found.family, found.names, found.unknown) == (layout, family, names, [])
    first = [key for key in map(parse, tensors) if key and key.part in ("down", "lokr_w1")]
    assert sum(found.layers.values()) == len(first)
    assert set(found.loads) == {"diffusers", "comfyui", "forge", "a1111", "kohya"}


def loads(tensors, folder, metadata=None):
    save_file(tensors, folder / "it.safetensors", metadata)
    return inspect(folder / "it.safetensors").loads


def test_what_loads_where_follows_from_the_file(tmp_path):
    """FORMATS 0."""
    flux, sd3 = (loads(FOREIGN[name][0], tmp_path) for name in ("kohya flux", "kohya sd3"))
    assert flux["diffusers"] == flux["comfyui"] == "yes" and flux["a1111"].startswith("no")
    assert sd3["comfyui"] == sd3["kohya"] == "yes" and sd3["diffusers"].startswith("no: it loads nothing")
    sdxl = loads(FOREIGN["kohya sdxl"][0], tmp_path)
    assert set(sdxl.values()) == {"yes"}
    unlike = FOREIGN["kohya sdxl"][0] | pair("lora_unet_middle_block_1_proj_in", 1280, 1280, alpha=1)
    assert loads(unlike, tmp_path)["diffusers"].startswith("wrong: alphas differ")
    one = pair("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 768, 768, alpha=2)
    assert loads(one, tmp_path)["diffusers"].startswith("partly")
    extra = FOREIGN["kohya sdxl"][0] | {f"something.{number}": tensor(1) for number in range(13)}
    assert loads(extra, tmp_path)["forge"].startswith("no: it refuses files with more than 12 unknown keys, here 13")
    lokr = {f"lora_unet_{ATTENTION}.lokr_w1": tensor(4, 4), f"lora_unet_{ATTENTION}.lokr_w2": tensor(8, 8)}
    assert loads(lokr, tmp_path)["comfyui"] == "yes" and loads(lokr, tmp_path)["diffusers"].startswith("no")
    assert loads(peft(f"unet.{DOTTED}", 768, 320), tmp_path)["comfyui"].startswith("partly: it drops attention")


@pytest.mark.parametrize(("shape", "right"), [((1, 768), True), ((320, 1), False)])
def test_dora_is_right_or_wrong_by_its_axis(shape, right, tmp_path):
    found = loads(FOREIGN["kohya sd1"][0] | {f"lora_unet_{ATTENTION}.dora_scale": tensor(*shape)}, tmp_path)
    assert (found["comfyui"] == "yes") is right
    assert found["diffusers"].startswith("wrong") and found["kohya"].startswith("wrong")


def test_header_and_card_give_words_base_and_maker(tmp_path):
    path = tmp_path / "it.safetensors"
    tags = json.dumps({"10_dog": {"zib dog": 9, "grass": 3}})
    metadata = {"ss_network_module": "networks.lora", "ss_sd_model_name": "base.safetensors", "ss_tag_frequency": tags}
    save_file(FOREIGN["kohya sd1"][0], path, metadata)
    found = inspect(path)
    assert (found.made_by, found.base) == ("kohya's tools (networks.lora)", "base.safetensors")
    assert found.triggers == ["zib dog", "grass"]
    path.with_suffix(".json").write_text(json.dumps({"activation text": "zib"}))
    assert inspect(path).triggers == ["zib"]
    save_file(FOREIGN["kohya sd1"][0], path, {"ss_tag_frequency": "{damaged"})
    assert inspect(path).made_by is None


@pytest.mark.parametrize("formats", ["diffusers", "kohya"])
def test_sizes_are_those_of_the_trained_change(formats, trained, recipe, tmp_path):
    family, adapter = trained(rank=4, alpha=2.0, targets="conv")
    (path,) = export(adapter.weights(), family, recipe(export={"formats": [formats]}), tmp_path)
    found, made = inspect(path), layers(adapter.weights())
    assert found.kind == "LoRA" and found.ranks == {4: len(made)} and found.triggers == ["zib star"]
    assert sum(block.layers for block in found.blocks) == len(made)
    whole = sum(float(layer.delta().square().sum()) for layer in made)
    assert sum(block.norm**2 for block in found.blocks) == pytest.approx(whole, rel=1e-5)
    middle = [layer for layer in made if layer.module.startswith("mid_block")]
    (block,) = [block for block in found.blocks if block.name.endswith("mid_block")]
    assert block.norm**2 == pytest.approx(sum(float(layer.delta().square().sum()) for layer in middle), rel=1e-5)
    assert found.made_by and found.made_by.startswith("finetune ")


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_sizes_of_lycoris_layers(kind, tmp_path):
    stem = f"lora_unet_{ATTENTION}"
    if kind == "loha":
        parts = {
            "hada_w1_a": tensor(8, 2),
            "hada_w1_b": tensor(2, 6),
            "hada_w2_a": tensor(8, 2),
            "hada_w2_b": tensor(2, 6),
        }
        product = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    else:
        parts = {"lokr_w1": tensor(2, 2), "lokr_w2_a": tensor(4, 2), "lokr_w2_b": tensor(2, 3)}
        product = torch.kron(parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"])
    held = {f"{stem}.{part}": value.contiguous() for part, value in parts.items()}
    save_file(held | {f"{stem}.alpha": torch.tensor(1.0)}, tmp_path / "it.safetensors")
    (block,) = inspect(tmp_path / "it.safetensors").blocks
    assert block.norm == pytest.approx(float(0.5 * product.norm()), rel=1e-5)


def test_blocks_stand_in_the_order_of_their_numbers(tmp_path):
    held = {}
    for number in (10, 9):
        held |= pair(f"lora_unet_double_blocks_{number}_img_mlp_0", 8, 32, alpha=4)
    save_file(held, tmp_path / "it.safetensors")
    assert [block.name for block in inspect(tmp_path / "it.safetensors").blocks] == [
        "lora_unet double_blocks.9",
        "lora_unet double_blocks.10",
    ]


def test_a_word_a_model_and_nonsense(tiny_sd, tmp_path):
    save_file({"<zib>": tensor(2, 768)}, tmp_path / "zib.safetensors")
    assert inspect(tmp_path / "zib.safetensors").kind == "new word"
    assert "StableDiffusionPipeline" in inspect(tiny_sd).notes[0]
    save_file({"a.b": tensor(2), "c.d": tensor(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no adapter of a kind that is known"):
        inspect(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no such file"):
        inspect(tmp_path / "missing.safetensors")


def test_the_command_says_it_in_words_and_for_programs(tmp_path):
    path = tmp_path / "it.safetensors"
    save_file(FOREIGN["kohya flux"][0], path)
    words = CliRunner().invoke(app, ["inspect", str(path)]).output
    assert "LoRA, layout kohya, original names" in words and "for       FLUX.1" in words
    found = json.loads(CliRunner().invoke(app, ["inspect", str(path), "--json"]).output)
    assert found["ranks"] == {"4": 2} and found["alphas"] == {"2.0": 2} and found["layers"] == {"lora_unet": 2}
