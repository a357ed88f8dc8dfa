"""Files of FLUX.1 and SD 3: layers that diffusers has apart are one, without loss, and come back."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusion3Pipeline,
)
from peft.tuners.lora import LoraLayer
from published import clip, denoiser, layers_of

from finetune.export import kohya
from finetune.export.layers import Layer
from finetune.family import ExportNames
from finetune.originals import Place, flux, sd3
from finetune.originals.tables import TABLES
from finetune.randomness import generator

HIDDEN = 8
BLOCK = "transformer_blocks.0"
TEXT = {
    "text_encoder": ExportNames("text_encoder", "lora_te1", "text_model."),
    "text_encoder_2": ExportNames("text_encoder_2", "lora_te3"),
}


def names(places) -> dict[str, ExportNames]:
    return {"denoiser": ExportNames("transformer", "lora_unet", places=places), **TEXT}


FLUX = names(flux.places({"num_layers": 1, "num_single_layers": 1}))
SD3 = names(sd3.places({"num_layers": 2, "dual_attention_layers": [0]}))


def layer(module, outputs=HIDDEN, rank=3, alpha=3.0, inputs=HIDDEN, network="denoiser"):
    down = torch.randn((rank, inputs), generator=generator(0, module))
    up = torch.randn((outputs, rank), generator=generator(1, module))
    return Layer(network=network, module=module, down=down, up=up, alpha=alpha)


def heights(places: dict[str, Place]) -> dict[str, int]:
    """Outputs of tiny layers in the right proportions: of a modulation of two halves an even number."""
    return {module: HIDDEN * place.share for module, place in places.items()}


def whole(tensors, stem):
    """What readers add to the weight of a layer."""
    down, up = tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"]
    return float(tensors[f"{stem}.alpha"]) / len(down) * up @ down


def test_queries_keys_and_values_are_one_layer():
    parts = [layer(f"{BLOCK}.attn.to_{part}") for part in "qkv"]
    tensors = kohya.pack(parts, FLUX, torch.float32)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    assert tensors.keys() == {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"}
    assert tensors[f"{stem}.lora_down.weight"].shape == (9, HIDDEN) and float(tensors[f"{stem}.alpha"]) == 9.0
    assert torch.equal(whole(tensors, stem), torch.cat([part.delta() for part in parts]))


def test_a_single_block_has_the_feed_forward_layer_below_them():
    block = "single_transformer_blocks.0"
    parts = [layer(f"{block}.attn.to_{part}") for part in "qkv"] + [layer(f"{block}.proj_mlp", 4 * HIDDEN)]
    tensors = kohya.pack(parts, FLUX, torch.float32)
    change = whole(tensors, "lora_unet_single_blocks_0_linear1")
    assert change.shape == (7 * HIDDEN, HIDDEN)
    assert torch.equal(change, torch.cat([part.delta() for part in parts]))


@pytest.mark.parametrize("present", ["q", "kv", "v"])
def test_layers_that_are_not_there_change_nothing(present):
    parts = [layer(f"{BLOCK}.attn.to_{part}") for part in present]
    tensors = kohya.pack(parts, FLUX, torch.float32)
    change = whole(tensors, "lora_unet_double_blocks_0_img_attn_qkv")
    found = {part.module[-1]: part.delta() for part in parts}
    zero = torch.zeros(HIDDEN, HIDDEN)
    assert torch.equal(change, torch.cat([found.get(part, zero) for part in "qkv"]))
    assert {one.module for one in kohya.unpack(tensors, FLUX)} == {part.module for part in parts}


@pytest.mark.parametrize("named", [FLUX, SD3], ids=["flux", "sd3"])
@pytest.mark.parametrize("alpha", [3.0, 1.5, 2.0])
def test_what_is_written_is_read_again(named, alpha):
    """Exact factors where all layers of one have one rank, and where the scale is a power of two."""
    made = [
        layer(module, outputs, rank=3, alpha=alpha) for module, outputs in heights(named["denoiser"].places).items()
    ]
    back = {one.module: one for one in kohya.unpack(kohya.pack(made, named, torch.float32), named)}
    assert back.keys() == {one.module for one in made}
    for one in made:
        again = back[one.module]
        assert again.rank == 3 and torch.equal(again.down, one.down)
        torch.testing.assert_close(again.delta(), one.delta(), atol=0 if alpha != 2.0 else 1e-6, rtol=0)


def test_unlike_ranks_and_alphas_are_read_again():
    made = [layer(f"{BLOCK}.attn.to_{part}", rank=rank, alpha=1.0) for part, rank in zip("qkv", (1, 4, 2), strict=True)]
    tensors = kohya.pack(made, FLUX, torch.float32)
    assert len(tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"]) == 7
    for one, again in zip(
        made, sorted(kohya.unpack(tensors, FLUX), key=lambda one: "qkv".index(one.module[-1])), strict=True
    ):
        assert again.rank == one.rank
        torch.testing.assert_close(again.delta(), one.delta(), atol=1e-6, rtol=0)


def test_a_layer_that_learned_nothing_keeps_its_place():
    made = [layer(f"{BLOCK}.attn.to_{part}") for part in "qkv"]
    made[1].up.zero_()
    back = kohya.unpack(kohya.pack(made, FLUX, torch.float32), FLUX)
    assert {one.module: one.rank for one in back} == {one.module: 3 for one in made}


def test_layers_trained_as_one_are_read_with_all_their_ranks():
    """A file of kohya's tools: every output uses every rank."""
    stem = "lora_unet_double_blocks_0_txt_attn_qkv"
    one = layer("trained", 3 * HIDDEN, rank=6, alpha=2.0)
    tensors = {
        f"{stem}.lora_down.weight": one.down,
        f"{stem}.lora_up.weight": one.up,
        f"{stem}.alpha": torch.tensor(2.0),
    }
    back = {found.module: found for found in kohya.unpack(tensors, FLUX)}
    parts = [back[f"{BLOCK}.attn.add_{part}_proj"] for part in "qkv"]
    assert [part.rank for part in parts] == [6, 6, 6]
    torch.testing.assert_close(torch.cat([part.delta() for part in parts]), one.delta())
    again = kohya.unpack(kohya.pack(parts, FLUX, torch.float32), FLUX)
    deltas = {found.module: found.delta() for found in again}
    torch.testing.assert_close(torch.cat([deltas[part.module] for part in parts]), one.delta())


@pytest.mark.parametrize(
    ("named", "module", "stem"),
    [
        (FLUX, "norm_out.linear", "lora_unet_final_layer_adaLN_modulation_1"),
        (SD3, "norm_out.linear", "lora_unet_final_layer_adaLN_modulation_1"),
        (SD3, "transformer_blocks.1.norm1_context.linear", "lora_unet_joint_blocks_1_context_block_adaLN_modulation_1"),
    ],
)
def test_shift_and_scale_are_the_other_way_round(named, module, stem):
    one = layer(module, 2 * HIDDEN)
    tensors = kohya.pack([one], named, torch.float32)
    first, second = one.delta().chunk(2)
    assert torch.equal(whole(tensors, stem), torch.cat([second, first]))
    (again,) = kohya.unpack(tensors, named)
    assert torch.equal(again.delta(), one.delta())


def test_text_encoders_of_flux():
    """FORMATS 1.3: CLIP is te1 and complete, T5 is te3."""
    clip = layer("encoder.layers.0.self_attn.q_proj", network="text_encoder", alpha=1.5)
    t5 = [layer(f"encoder.block.0.layer.{name}", network="text_encoder_2") for name in T5]
    tensors = kohya.pack([clip, *t5], FLUX, torch.float32)
    stem = "lora_te1_text_model_encoder_layers_0_self_attn_"
    assert {f"{stem}{part}_proj.lora_up.weight" for part in ("q", "k", "v", "out")} <= tensors.keys()
    assert not tensors[f"{stem}out_proj.lora_up.weight"].any()
    assert torch.equal(whole(tensors, f"{stem}q_proj"), clip.delta())
    assert "lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0.lora_down.weight" in tensors
    back = {one.name for one in kohya.unpack(tensors, FLUX)}
    assert {one.name for one in (clip, *t5)} <= back


T5 = ("0.SelfAttention.q", "0.SelfAttention.o", "1.DenseReluDense.wi_0", "1.DenseReluDense.wi_1", "1.DenseReluDense.wo")


def test_half_precision_states_every_rank_exactly():
    made = [layer(f"{BLOCK}.attn.to_{part}", rank=101) for part in "qkv"]
    tensors = kohya.pack(made, FLUX, torch.bfloat16)
    assert float(tensors["lora_unet_double_blocks_0_img_attn_qkv.alpha"]) == 303.0
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].dtype == torch.bfloat16


def test_diffusers_converts_flux_back():
    """One block of either kind in the published widths, rank 1, by diffusers' own converter."""
    network, rank = denoiser("flux"), 1
    table = TABLES["FluxTransformer2DModel"](network.config)
    inside = [name for name in layers_of(network) if re.match(r"(single_)?transformer_blocks\.0\.", name)]
    made = [sized(network, module, rank) for module in (*inside, "norm_out.linear", "proj_out")]
    encoder = clip(768, 12)
    text = [sized(encoder, f"encoder.layers.0.{name}", rank, "text_encoder") for name in CLIP]
    packed = kohya.pack([*made, *text], names(table), torch.float32)
    found = FluxPipeline.lora_state_dict(packed)
    placed = {key.removeprefix("transformer."): tensor for key, tensor in found.items()}
    for one in made:
        assert torch.equal(placed.pop(f"{one.module}.lora_A.weight"), one.down), one.module
        assert torch.equal(placed.pop(f"{one.module}.lora_B.weight"), one.up), one.module
    assert all(key.startswith("text_encoder.text_model.") for key in placed) and len(placed) == 2 * len(CLIP)


CLIP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1")


def sized(network, module, rank, called="denoiser"):
    """A layer as large as the published model's, of whole scale."""
    outputs, inputs = network.get_submodule(module).weight.shape
    return layer(module, outputs, rank, float(rank), inputs, called)


def tiny_flux():
    """A pipeline with nothing but a denoiser."""
    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=HIDDEN,
        num_attention_heads=1,
        joint_attention_dim=HIDDEN,
        pooled_projection_dim=HIDDEN,
        axes_dims_rope=(2, 2, 4),
    )
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, network)


def test_diffusers_draws_with_the_fused_layers_of_a_double_block():
    """Through ``load_lora_weights`` itself. Its converter knows single blocks of the published width alone."""
    pipeline = tiny_flux()
    inside = [name for name in layers_of(pipeline.transformer) if name.startswith("transformer_blocks.")]
    made = [sized(pipeline.transformer, module, 2) for module in inside]
    before = {one.module: pipeline.transformer.get_submodule(one.module).weight.clone() for one in made}
    pipeline.load_lora_weights(kohya.pack(made, FLUX, torch.float32), adapter_name="it")
    pipeline.fuse_lora()
    for one in made:
        weight = pipeline.transformer.get_submodule(one.module).weight
        torch.testing.assert_close(weight - before[one.module], one.delta(), atol=1e-6, rtol=0)


def test_diffusers_loses_layers_of_flux_outside_the_blocks():
    """Its converter forgets the component's name. ``finetune inspect`` says so; layout diffusers has them."""
    pipeline = tiny_flux()
    ends = [sized(pipeline.transformer, module, 2) for module in ("x_embedder", "norm_out.linear")]
    inside = sized(pipeline.transformer, f"{BLOCK}.attn.to_out.0", 2)
    pipeline.load_lora_weights(kohya.pack([*ends, inside], FLUX, torch.float32), adapter_name="it")
    placed = [name for name, part in pipeline.transformer.named_modules() if isinstance(part, LoraLayer)]
    assert placed == [inside.module]


def test_diffusers_takes_nothing_from_kohyas_names_of_sd3():
    """FORMATS 0: so ``finetune verify`` does not ask it to."""
    made = [layer(f"{BLOCK}.attn.to_{part}") for part in "qkv"]
    found = StableDiffusion3Pipeline.lora_state_dict(kohya.pack(made, SD3, torch.float32))
    assert not [key for key in found if key.startswith("transformer.")]
