"""The names of single files: of the real published models, built without memory for a weight."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from published import FLUX as FLUX_DEV
from published import SD3 as SD3_MEDIUM
from published import SD35_LARGE, SD35_MEDIUM
from torch import Tensor

from finetune.families import families
from finetune.families.single_file.layouts import FLUX, SD1, SD2, SD3, SDXL, Layout
from finetune.families.single_file.network import weights_of
from finetune.families.single_file.published import documents
from finetune.originals import Place
from finetune.originals.tensors import fill, take

Settings = Mapping[str, Mapping[str, Any]]

VAE16 = {
    **documents(SD1, "epsilon")["vae/config.json"],
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
T5 = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
}
CLIPS = {name: documents(SDXL, "epsilon")[f"{name}/config.json"] for name in ("text_encoder", "text_encoder_2")}


def sd3(transformer: Mapping[str, Any]) -> tuple[Layout, Settings]:
    return SD3, {"transformer": transformer, "vae": VAE16, **CLIPS, "text_encoder_3": T5}


def flux(transformer: Mapping[str, Any]) -> tuple[Layout, Settings]:
    return FLUX, {
        "transformer": transformer,
        "vae": VAE16,
        "text_encoder": CLIPS["text_encoder"],
        "text_encoder_2": T5,
    }


def described(layout: Layout) -> tuple[Layout, Settings]:
    found = documents(layout, "epsilon")
    return layout, {name: found[f"{name}/config.json"] for name in layout.components}


MODELS: dict[str, tuple[Layout, Settings]] = {
    "SD 1.5": described(SD1),
    "SD 2.1": described(SD2),
    "SDXL": described(SDXL),
    "SD 3 medium": sd3(SD3_MEDIUM),
    "SD 3.5 medium": sd3(SD35_MEDIUM),
    "SD 3.5 large": sd3(SD35_LARGE),
    "FLUX.1 dev": flux(FLUX_DEV),
    "FLUX.1 schnell": flux({**FLUX_DEV, "guidance_embeds": False}),
}
TENSORS = {  # of each network in the file
    "SD 1.5": {"unet": 686, "vae": 248, "text_encoder": 196},
    "SD 2.1": {"unet": 686, "vae": 248, "text_encoder": 280},
    "SDXL": {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 389},
    "FLUX.1 dev": {"transformer": 780, "vae": 244, "text_encoder": 196, "text_encoder_2": 219},
    "FLUX.1 schnell": {"transformer": 776},
}
NUMBERS = {  # of parameters
    "SD 1.5": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "SD 2.1": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "SDXL": {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    "FLUX.1 dev": {"transformer": 11_901_408_320, "vae": 83_819_683, "text_encoder_2": 4_762_310_656},
}
UNET, VAE = "model.diffusion_model", "first_stage_model"
CLIP_L, CLIP_G, T5XXL = (f"text_encoders.{name}.transformer" for name in ("clip_l", "clip_g", "t5xxl"))
KNOWN = {  # names and shapes of published files
    "SD 1.5": {
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
    "SD 2.1": {
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
    "SDXL": {
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
    "SD 3 medium": {
        f"{UNET}.pos_embed": (1, 36864, 1536),
        f"{UNET}.x_embedder.proj.weight": (1536, 16, 2, 2),
        f"{UNET}.context_embedder.weight": (1536, 4096),
        f"{UNET}.y_embedder.mlp.0.weight": (1536, 2048),
        f"{UNET}.joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536),
        f"{UNET}.joint_blocks.23.context_block.attn.qkv.bias": (4608,),
        f"{UNET}.joint_blocks.23.context_block.adaLN_modulation.1.weight": (3072, 1536),
        f"{UNET}.joint_blocks.22.context_block.mlp.fc1.weight": (6144, 1536),
        f"{UNET}.final_layer.adaLN_modulation.1.weight": (3072, 1536),
        f"{UNET}.final_layer.linear.weight": (64, 1536),
        f"{VAE}.decoder.conv_in.weight": (512, 16, 3, 3),
        f"{CLIP_L}.text_model.encoder.layers.11.self_attn.q_proj.weight": (768, 768),
        f"{CLIP_G}.text_projection.weight": (1280, 1280),
        f"{T5XXL}.shared.weight": (32128, 4096),
        f"{T5XXL}.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
        f"{T5XXL}.encoder.block.23.layer.1.DenseReluDense.wi_1.weight": (10240, 4096),
        f"{T5XXL}.encoder.final_layer_norm.weight": (4096,),
    },
    "SD 3.5 medium": {
        f"{UNET}.pos_embed": (1, 147456, 1536),
        f"{UNET}.joint_blocks.12.x_block.attn2.qkv.weight": (4608, 1536),
        f"{UNET}.joint_blocks.12.x_block.attn2.ln_k.weight": (64,),
        f"{UNET}.joint_blocks.0.x_block.adaLN_modulation.1.weight": (13824, 1536),
    },
    "SD 3.5 large": {
        f"{UNET}.joint_blocks.37.x_block.attn.ln_q.weight": (64,),
        f"{UNET}.joint_blocks.37.context_block.attn.ln_k.weight": (64,),
        f"{UNET}.joint_blocks.37.x_block.mlp.fc1.weight": (9728, 2432),
    },
    "FLUX.1 dev": {
        f"{UNET}.img_in.weight": (3072, 64),
        f"{UNET}.guidance_in.in_layer.weight": (3072, 256),
        f"{UNET}.double_blocks.18.img_attn.qkv.weight": (9216, 3072),
        f"{UNET}.double_blocks.0.txt_attn.norm.key_norm.scale": (128,),
        f"{UNET}.double_blocks.0.img_mod.lin.weight": (18432, 3072),
        f"{UNET}.single_blocks.37.linear1.weight": (21504, 3072),
        f"{UNET}.single_blocks.37.linear2.weight": (3072, 15360),
        f"{UNET}.single_blocks.0.norm.query_norm.scale": (128,),
        f"{UNET}.final_layer.adaLN_modulation.1.bias": (6144,),
        "vae.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        f"{CLIP_L}.text_model.final_layer_norm.weight": (768,),
    },
}

CONVERTERS = {"unet": theirs.convert_ldm_unet_checkpoint, "vae": theirs.convert_ldm_vae_checkpoint}
models = pytest.mark.parametrize("model", MODELS)


@functools.cache
def network(model: str, subfolder: str) -> tuple[dict[str, Tensor], dict[str, Place]]:
    """Weights without memory, and their places."""
    layout, settings = MODELS[model]
    part = next(part for part in families()[layout.family].parts.values() if part.subfolder == subfolder)
    component = layout.components[subfolder]
    weights = {component.full(name): value for name, value in weights_of(part, settings[subfolder]).items()}
    return weights, layout.places(subfolder, weights, settings[subfolder])


def tensors(weights: Mapping[str, Tensor], places: Mapping[str, Place]) -> dict[str, Tensor]:
    """What stands in the file; ``fill`` refuses what is not whole."""
    found: dict[str, tuple[list[Place], list[Tensor]]] = {}
    for name, place in places.items():
        held = found.setdefault(place.path, ([], []))
        held[0].append(place)
        held[1].append(weights[name])
    return {key: fill(*pieces) for key, pieces in found.items()}


def whole(model: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for subfolder in MODELS[model][0].components:
        found |= tensors(*network(model, subfolder))
    return found


@models
def test_every_weight_has_one_place_and_every_place_one_weight(model: str) -> None:
    for subfolder in MODELS[model][0].components:
        weights, places = network(model, subfolder)
        assert places.keys() == weights.keys()
        assert len({(place.path, place.first) for place in places.values()}) == len(places)
        made, count = tensors(weights, places), sum(value.numel() for value in weights.values())
        assert sum(value.numel() for value in made.values()) == count
        assert TENSORS.get(model, {}).get(subfolder, len(made)) == len(made)
        assert NUMBERS.get(model, {}).get(subfolder, count) == count
        for name, place in places.items():
            assert take(place, made[place.path]).shape == weights[name].shape, name


@pytest.mark.parametrize("model", KNOWN)
def test_names_and_shapes_are_those_of_the_published_files(model: str) -> None:
    shapes = {key: tuple(value.shape) for key, value in whole(model).items()}
    assert {key: shapes.get(key) for key in KNOWN[model]} == KNOWN[model]


@pytest.mark.parametrize("model", ["SD 1.5", "SD 2.1", "SDXL"])
def test_diffusers_reads_every_name_back(model: str) -> None:
    """By its own converters, which start from the file's names and know nothing of ours."""
    file, (_, settings) = whole(model), MODELS[model]
    for subfolder, convert in CONVERTERS.items():
        back, (weights, _) = convert(file, dict(settings[subfolder])), network(model, subfolder)
        assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in weights.items()}


@pytest.mark.parametrize("model", [model for model, (layout, _) in MODELS.items() if layout.flow])
def test_diffusers_takes_fused_and_swapped_layers_apart_alike(model: str) -> None:
    """Of every weight one column of numbers, all different: rows are all that its converters move."""
    layout, settings = MODELS[model]
    weights, places = network(model, "transformer")
    thin, next_one = {}, 0
    for name, value in weights.items():
        rows = value.shape[0]
        thin[name] = torch.arange(next_one, next_one + rows, dtype=torch.float64).view(rows, *[1] * (value.dim() - 1))
        next_one += rows
    file = tensors(thin, places)
    convert = {
        SD3: theirs.convert_sd3_transformer_checkpoint_to_diffusers,
        FLUX: theirs.convert_flux_transformer_checkpoint_to_diffusers,
    }[layout]
    back = convert(dict(file))
    assert back.keys() == thin.keys()
    assert all(torch.equal(back[name], value) for name, value in thin.items())
    assert all(torch.equal(take(place, file[place.path]), thin[name]) for name, place in places.items())
    vae, (weights, _) = CONVERTERS["vae"](whole(model), dict(settings["vae"])), network(model, "vae")
    assert {key: value.shape for key, value in vae.items()} == {key: value.shape for key, value in weights.items()}


@pytest.mark.parametrize(("layout", "subfolder"), [(SD2, "text_encoder"), (SDXL, "text_encoder_2")])
def test_diffusers_takes_the_fused_weights_of_clips_apart_alike(layout: Layout, subfolder: str) -> None:
    part = next(part for part in families()[layout.family].parts.values() if part.subfolder == subfolder)
    small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {**documents(layout, "epsilon")[f"{subfolder}/config.json"], **small, "projection_dim": 6}
    module, component = part.type(part.type.config_class(**settings)), layout.components[subfolder]
    weights = {component.full(name): value for name, value in module.state_dict().items()}
    file = tensors(weights, layout.places(subfolder, weights, settings))
    back = theirs.convert_open_clip_checkpoint(module, file, prefix=component.prefix)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())


def test_older_names_of_the_autoencoders_attention_have_the_same_places() -> None:
    """The files of SD 1.5's and 2.1's folders still have them."""
    layout, settings = MODELS["SD 1.5"]
    weights, places = network("SD 1.5", "vae")
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name in (name for name in weights if "attentions" in name and "to_" in name):
        modern = next(part for part in older if part in name)
        renamed = name.replace(modern, older[modern])
        assert layout.places("vae", [renamed], settings["vae"])[renamed] == places[name]


def test_two_thirds_make_no_tensor() -> None:
    with pytest.raises(ValueError, match="made of 3 shares; there are 2"):
        fill([Place("a", 0, 1, 3), Place("a", 2, 1, 3)], [torch.ones(1), torch.ones(1)])
