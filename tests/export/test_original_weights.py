"""The names of single files: of the real SD 1.5, SD 2.1 and SDXL, built without memory for a weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from finetune.families.originals.clip import in_full
from finetune.families.originals.convert import meta
from finetune.families.originals.layouts import LAYOUTS, SD1, SD2, SDXL, Layout
from finetune.families.originals.place import Place, fill
from finetune.families.originals.published import documents
from finetune.families.originals.template import parts_of
from torch import Tensor

PUBLISHED = {  # weights and tensors of each network
    SD1: {"unet": (686, 686), "vae": (248, 248), "text_encoder": (196, 196)},
    SD2: {"unet": (686, 686), "vae": (248, 248), "text_encoder": (372, 280)},
    SDXL: {"unet": (1680, 1680), "vae": (248, 248), "text_encoder": (196, 196), "text_encoder_2": (517, 389)},
}
NUMBERS = {  # of parameters
    SD1: {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    SD2: {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    SDXL: {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}
UNET, VAE = "model.diffusion_model", "first_stage_model"
KNOWN = {  # names and shapes of published files
    SD1: {
        f"{UNET}.time_embed.0.weight": (1280, 320),
        f"{UNET}.time_embed.2.bias": (1280,),
        f"{UNET}.input_blocks.0.0.weight": (320, 4, 3, 3),
        f"{UNET}.input_blocks.1.0.in_layers.0.weight": (320,),
        f"{UNET}.input_blocks.1.0.in_layers.2.weight": (320, 320, 3, 3),
        f"{UNET}.input_blocks.1.0.emb_layers.1.weight": (320, 1280),
        f"{UNET}.input_blocks.1.0.out_layers.3.weight": (320, 320, 3, 3),
        f"{UNET}.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        f"{UNET}.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        f"{UNET}.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        f"{UNET}.input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
        f"{UNET}.input_blocks.11.0.out_layers.0.bias": (1280,),
        f"{UNET}.middle_block.0.in_layers.2.weight": (1280, 1280, 3, 3),
        f"{UNET}.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
        f"{UNET}.middle_block.2.out_layers.3.bias": (1280,),
        f"{UNET}.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        f"{UNET}.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        f"{UNET}.output_blocks.11.1.proj_out.weight": (320, 320, 1, 1),
        f"{UNET}.out.0.weight": (320,),
        f"{UNET}.out.2.weight": (4, 320, 3, 3),
        f"{VAE}.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        f"{VAE}.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        f"{VAE}.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        f"{VAE}.encoder.mid.block_2.conv1.weight": (512, 512, 3, 3),
        f"{VAE}.encoder.norm_out.weight": (512,),
        f"{VAE}.decoder.mid.attn_1.proj_out.bias": (512,),
        f"{VAE}.decoder.up.0.block.0.conv1.weight": (128, 256, 3, 3),
        f"{VAE}.decoder.up.3.block.2.conv2.weight": (512, 512, 3, 3),
        f"{VAE}.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        f"{VAE}.post_quant_conv.weight": (4, 4, 1, 1),
        f"{VAE}.quant_conv.weight": (8, 8, 1, 1),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
        "cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.q_proj.weight": (768, 768),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,),
    },
    SD2: {
        f"{UNET}.input_blocks.1.1.proj_in.weight": (320, 320),
        f"{UNET}.output_blocks.11.1.transformer_blocks.0.attn2.to_v.weight": (320, 1024),
        "cond_stage_model.model.positional_embedding": (77, 1024),
        "cond_stage_model.model.token_embedding.weight": (49408, 1024),
        "cond_stage_model.model.transformer.resblocks.0.ln_1.weight": (1024,),
        "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
        "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_bias": (3072,),
        "cond_stage_model.model.transformer.resblocks.22.attn.out_proj.weight": (1024, 1024),
        "cond_stage_model.model.transformer.resblocks.22.mlp.c_fc.weight": (4096, 1024),
        "cond_stage_model.model.transformer.resblocks.22.mlp.c_proj.weight": (1024, 4096),
        "cond_stage_model.model.ln_final.bias": (1024,),
    },
    SDXL: {
        f"{UNET}.label_emb.0.0.weight": (1280, 2816),
        f"{UNET}.label_emb.0.2.weight": (1280, 1280),
        f"{UNET}.input_blocks.2.0.in_layers.2.weight": (320, 320, 3, 3),
        f"{UNET}.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        f"{UNET}.input_blocks.6.0.op.weight": (640, 640, 3, 3),
        f"{UNET}.input_blocks.8.1.transformer_blocks.9.ff.net.2.weight": (1280, 5120),
        f"{UNET}.middle_block.1.transformer_blocks.9.norm3.weight": (1280,),
        f"{UNET}.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        f"{UNET}.output_blocks.5.2.conv.weight": (640, 640, 3, 3),
        f"{UNET}.output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.ln_final.weight": (1280,),
    },
}
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)


def network(layout: Layout, subfolder: str) -> tuple[Mapping[str, Any], dict[str, Tensor], dict[str, Place]]:
    """Settings, weights without memory and their places."""
    part = next(part for part in parts_of(layout) if part.subfolder == subfolder)
    settings = documents(layout, "epsilon")[f"{subfolder}/config.json"]
    weights = meta(part, settings)
    return settings, weights, layout.places(subfolder, weights, settings)


def tensors(weights: Mapping[str, Tensor], places: Mapping[str, Place]) -> dict[str, Tensor]:
    """What stands in the file."""
    found: dict[str, list[tuple[Place, Tensor]]] = {}
    for name, place in places.items():
        found.setdefault(place.key, []).append((place, weights[name]))
    return {key: fill(pieces) for key, pieces in found.items()}


def whole(layout: Layout) -> dict[str, Tensor]:
    return {
        key: value for subfolder in layout.components for key, value in tensors(*network(layout, subfolder)[1:]).items()
    }


@layouts
def test_every_weight_has_one_place_and_every_place_one_weight(layout: Layout) -> None:
    for subfolder in layout.components:
        _, weights, places = network(layout, subfolder)
        assert places.keys() == weights.keys()
        assert max(Counter((place.key, place.third) for place in places.values()).values()) == 1
        made = tensors(weights, places)  # three thirds of each, or it raises
        assert (len(weights), len(made)) == PUBLISHED[layout][subfolder]
        assert sum(value.numel() for value in weights.values()) == NUMBERS[layout][subfolder]
        assert sum(value.numel() for value in made.values()) == NUMBERS[layout][subfolder]
        for name, place in places.items():
            assert place.take(made[place.key]).shape == weights[name].shape, name


@layouts
def test_names_and_shapes_are_those_of_the_published_files(layout: Layout) -> None:
    shapes = {key: tuple(value.shape) for key, value in whole(layout).items()}
    assert {key: shapes.get(key) for key in KNOWN[layout]} == KNOWN[layout]


@layouts
def test_diffusers_reads_every_name_back(layout: Layout) -> None:
    """By its own converters, which start from the file's names and know nothing of ours."""
    file = whole(layout)
    settings, weights, _ = network(layout, "unet")
    back = theirs.convert_ldm_unet_checkpoint(file, dict(settings))
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in weights.items()}
    settings, weights, _ = network(layout, "vae")
    back = theirs.convert_ldm_vae_checkpoint(file, dict(settings))
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in weights.items()}


@pytest.mark.parametrize(("layout", "subfolder"), [(SD2, "text_encoder"), (SDXL, "text_encoder_2")])
def test_diffusers_takes_the_fused_weights_apart_alike(layout: Layout, subfolder: str) -> None:
    part = next(part for part in parts_of(layout) if part.subfolder == subfolder)
    small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {**documents(layout, "epsilon")[f"{subfolder}/config.json"], **small, "projection_dim": 6}
    module = part.type(part.type.config_class(**settings))
    weights = {in_full(name): value for name, value in module.state_dict().items()}
    file = tensors(weights, layout.places(subfolder, weights, settings))
    back = theirs.convert_open_clip_checkpoint(module, file, prefix=layout.components[subfolder].prefix)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())


def test_older_names_of_the_autoencoders_attention_have_the_same_places() -> None:
    """The files of SD 1.5's and 2.1's folders still have them."""
    settings, weights, places = network(SD1, "vae")
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name in (name for name in weights if "attentions" in name and "to_" in name):
        modern = next(part for part in older if part in name)
        renamed = name.replace(modern, older[modern])
        assert SD1.places("vae", [renamed], settings)[renamed] == places[name]


def test_two_thirds_make_no_tensor() -> None:
    with pytest.raises(ValueError, match="made of three"):
        fill([(Place("a", third=0), torch.ones(1)), (Place("a", third=2), torch.ones(1))])
