"""Names of the real Stable Diffusion 1's layers, without its weights."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from finetune.export import readers
from finetune.export.names import joined, parted
from finetune.originals.unet import places


@pytest.fixture(scope="module")
def sd1():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        encoder = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12))
    return {"denoiser": unet, "text_encoder": encoder}


def layers_of(module):
    return [name for name, part in module.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))]


def test_every_layer_has_an_underscored_name_that_reads_back(sd1):
    for name in [*layers_of(sd1["denoiser"]), *(f"text_model.{name}" for name in layers_of(sd1["text_encoder"]))]:
        assert parted(joined(name)) == name
    with pytest.raises(ValueError, match=r"no underscored name"):
        joined("some_new.module")


def test_kohya_knows_its_192_and_72_layers(sd1, tiny_family):
    known = readers.kohya(sd1, tiny_family.export_names)
    attention = [name for name in known if "_attentions_" in name]
    assert len(attention) == 192 and sum(name.startswith("lora_te_text_model_") for name in known) == 72


@pytest.mark.parametrize(
    ("ours", "original"),
    [
        ("conv_in", "input_blocks.0.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("down_blocks.0.resnets.0.conv1", "input_blocks.1.0.in_layers.2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in"),
        ("down_blocks.3.resnets.1.time_emb_proj", "input_blocks.11.0.emb_layers.1"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "middle_block.1.transformer_blocks.0.attn2.to_k"),
        ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("up_blocks.3.attentions.2.proj_out", "output_blocks.11.1.proj_out"),
        ("up_blocks.2.resnets.0.conv_shortcut", "output_blocks.6.0.skip_connection"),
    ],
)
def test_original_names(ours, original, sd1):
    unet = sd1["denoiser"]
    assert places(unet.config)[ours].path == original
    assert readers.a1111_name(f"lora_unet_{joined(ours)}", unet) == original.replace(".", "_")


def test_all_tools_know_the_layers_that_presets_adapt(sd1, tiny_family):
    """What the widest preset trains reaches every tool."""
    names = tiny_family.export_names
    patterns = tiny_family.sites.linears["conv"]["denoiser"]
    stems = {
        f"lora_unet_{joined(name)}"
        for name in layers_of(sd1["denoiser"])
        if any(re.fullmatch(pattern, name) for pattern in patterns)
    }
    assert len(stems) > 192
    for tool in readers.TOOLS.values():
        assert stems <= tool(sd1, names).keys()
    assert readers.standard_geometry(sd1["denoiser"])


def test_original_names_are_one_to_one(sd1):
    unet = sd1["denoiser"]
    table = places(unet.config)
    originals = [table[name].path for name in layers_of(unet)]
    assert len(set(originals)) == len(originals)
