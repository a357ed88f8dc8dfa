"""LoHa, LoKr and whole differences under the names of FLUX.1 and SD 3."""

from __future__ import annotations

import pytest
import torch
from test_fused_files import BLOCK, FLUX, HIDDEN, SD3

from finetune.export import lycoris_kohya
from finetune.export.lycoris import Change
from finetune.randomness import generator

STEM = "lora_unet_double_blocks_0_img_attn_qkv"


def drawn(name, *shape):
    return torch.randn(shape, generator=generator(0, name))


def change(algorithm, module, outputs=HIDDEN, scale=0.5, rank=2):
    sizes = {
        "loha": {
            "hada_w1_a": (outputs, rank),
            "hada_w1_b": (rank, HIDDEN),
            "hada_w2_a": (outputs, rank),
            "hada_w2_b": (rank, HIDDEN),
        },
        "lokr": {"lokr_w1": (2, 2), "lokr_w2": (outputs // 2, HIDDEN // 2)},
        "full": {"diff": (outputs, HIDDEN)},
    }
    parts = {part: drawn(f"{module} {part}", *shape) for part, shape in sizes[algorithm].items()}
    return Change(
        network="denoiser", module=module, algorithm=algorithm, parts=parts, scale=1.0 if algorithm == "full" else scale
    )


def by_hand(parts):
    """As readers compute it."""
    if "diff" in parts:
        return parts["diff"]
    product = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    return float(parts["alpha"]) / len(parts["hada_w1_b"]) * product


@pytest.mark.parametrize("present", ["qkv", "qv", "k"])
@pytest.mark.parametrize("algorithm", ["loha", "lokr", "full"])
def test_layers_that_are_one_change_it_as_they_do_apart(algorithm, present):
    made = [change(algorithm, f"{BLOCK}.attn.to_{part}") for part in present]
    tensors = lycoris_kohya.pack(made, FLUX, torch.float32)
    parts = {key.removeprefix(f"{STEM}."): tensor for key, tensor in tensors.items()}
    assert parts.keys() == (
        {"diff"} if algorithm != "loha" else {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"}
    )
    found = {one.module[-1]: one.difference() for one in made}
    zero = torch.zeros(HIDDEN, HIDDEN)
    torch.testing.assert_close(by_hand(parts), torch.cat([found.get(part, zero) for part in "qkv"]))
    back = {one.module: one for one in lycoris_kohya.unpack(tensors, FLUX)}
    assert back.keys() == {one.module for one in made}
    for one in made:
        torch.testing.assert_close(back[one.module].difference(), one.difference())
        assert back[one.module].rank == (2 if algorithm == "loha" else None)


def test_lokr_keeps_its_factors_where_a_layer_is_alone():
    alone, fused = change("lokr", f"{BLOCK}.attn.to_out.0"), change("lokr", f"{BLOCK}.attn.to_q")
    tensors = lycoris_kohya.pack([alone, fused], FLUX, torch.float32)
    assert {"lora_unet_double_blocks_0_img_attn_proj.lokr_w1", f"{STEM}.diff"} <= tensors.keys()
    assert lycoris_kohya.algorithm_of(sorted(tensors)) == "lokr"


def test_lokr_that_was_trained_as_one_is_read_as_differences():
    whole = change("lokr", "whole", 3 * HIDDEN, scale=1.0)
    tensors = {f"{STEM}.{part}": tensor for part, tensor in whole.parts.items()}
    back = {one.module: one.difference() for one in lycoris_kohya.unpack(tensors, FLUX)}
    torch.testing.assert_close(torch.cat([back[f"{BLOCK}.attn.to_{part}"] for part in "qkv"]), whole.difference())


@pytest.mark.parametrize("algorithm", ["loha", "lokr", "full"])
def test_shift_and_scale_are_the_other_way_round(algorithm):
    one = change(algorithm, "norm_out.linear", 2 * HIDDEN)
    tensors = lycoris_kohya.pack([one], SD3, torch.float32)
    stem = "lora_unet_final_layer_adaLN_modulation_1."
    first, second = one.difference().chunk(2)
    written = by_hand({key.removeprefix(stem): tensor for key, tensor in tensors.items()})
    torch.testing.assert_close(written, torch.cat([second, first]))
    (again,) = lycoris_kohya.unpack(tensors, SD3)
    torch.testing.assert_close(again.difference(), one.difference())


def test_unlike_scales_are_in_the_numbers():
    made = [
        change("loha", f"{BLOCK}.attn.to_{part}", scale=scale) for part, scale in zip("qk", (0.5, 2.0), strict=True)
    ]
    tensors = lycoris_kohya.pack(made, FLUX, torch.float32)
    for one, again in zip(made, lycoris_kohya.unpack(tensors, FLUX), strict=True):
        torch.testing.assert_close(again.difference(), one.difference())


def test_lokr_of_such_a_family_is_written_for_other_tools_only_by_name(recipe):
    from finetune.export.kinds import lycoris

    adapter = {"kind": "lokr", "rank": 2}
    assert list(lycoris.file_names(recipe(adapter=adapter), "lokr", FLUX)) == ["peft"]
    assert list(lycoris.file_names(recipe(adapter=adapter, export={"formats": ["kohya"]}), "lokr", FLUX)) == ["kohya"]
    assert list(lycoris.file_names(recipe(adapter={"kind": "loha", "rank": 2}), "loha", FLUX)) == ["peft", "kohya"]
