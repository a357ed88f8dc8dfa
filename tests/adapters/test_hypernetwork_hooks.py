"""Hypernetworks in their places: keys and values alone, every width its pair, chains and wrappers (METHODS 4)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from hypernetworks import CONTEXT, WIDTH, answer, ask, attached, config, hooked, read_by, trained
from torch import nn

from finetune.adapters.hypernetwork import Hypernetworks
from finetune.errors import UserError
from finetune.family import Unsupported
from finetune.hypernet import Structure, attach, widths


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_layers_read_c_plus_m_f_of_c(
    make_unet: Callable[[], UNet2DConditionModel], strength: float, processor: type
) -> None:
    """§4.7: the input of to_k and to_v is c + m F(c) in eval, for every attention processor; m = 0 is the base."""
    unet = make_unet()
    unet.set_attn_processor(processor())
    before = ask(unet)
    network = trained([WIDTH, CONTEXT], structure=Structure(activation="swish"))
    network.multiplier = strength
    attach(unet, network)
    for block, width in (("attn1", WIDTH), ("attn2", CONTEXT)):
        attention = getattr(unet.mid_block.attentions[0].transformer_blocks[0], block)
        for role in ("k", "v"):
            mlp = network[str(width)][role]  # type: ignore[index]
            with read_by(getattr(attention, f"to_{role}")) as pairs, torch.no_grad():
                answered = ask(unet)
                ((given, read),) = pairs
                torch.testing.assert_close(read, given + strength * mlp.linear(given), rtol=1e-6, atol=1e-6)
                assert torch.equal(read, given) == (strength == 0)
    assert torch.equal(answered, before) == (strength == 0)


def test_queries_are_untouched(make_unet: Callable[[], UNet2DConditionModel]) -> None:
    """§4.1: q = to_q(x)."""
    unet = make_unet()
    attach(unet, trained([WIDTH, CONTEXT]))
    assert not any(
        part._forward_pre_hooks for name, part in unet.named_modules() if name.endswith(("to_q", "to_out.0"))
    )


@pytest.mark.parametrize("multiplier", [0.0, 0.3])
def test_strength_has_no_part_in_training(tiny_sd: Path, multiplier: float) -> None:
    """§4.6, §4.7: in train mode m is ignored, so that nothing that a user has set leaks into training."""
    family, adapter = attached(tiny_sd, init="xavier_normal")
    whole = answer(family)
    adapter.network.multiplier = multiplier
    family.networks["hypernetwork"].eval()
    assert not torch.equal(answer(family), whole)
    family.networks["hypernetwork"].train()
    assert torch.equal(answer(family), whole)


def test_the_prompt_s_width_alone_leaves_self_attention_untouched(
    make_unet: Callable[[], UNet2DConditionModel],
) -> None:
    """§4.7: sizes [ctx] hook as many layers as there are attn2, and no attn1."""
    unet = make_unet()
    assert widths(unet) == [WIDTH, CONTEXT]
    attach(unet, trained([CONTEXT]))
    crossing = sum(name.endswith("attn2") for name, _ in unet.named_modules())
    assert crossing == 4
    assert len(hooked(unet)) == 2 * crossing
    assert all(".attn2.to_" in name for name in hooked(unet))
    whole = make_unet()
    attach(whole, trained([WIDTH, CONTEXT]))
    assert len(hooked(whole)) == 4 * crossing
    assert set(hooked(whole).values()) == {1}


def test_layers_of_one_width_share_one_pair(make_unet: Callable[[], UNet2DConditionModel], tiny_sd: Path) -> None:
    """§4.7: one module object per width."""
    _, adapter = attached(tiny_sd)
    mlps = [name for name, part in adapter.network.named_modules() if type(part).__name__ == "Mlp"]
    assert mlps == ["16.k", "16.v"]
    unet = make_unet()
    network = trained([WIDTH])
    attach(unet, network)
    calls: list[str] = []
    network["16"]["k"].register_forward_hook(lambda *_: calls.append("k"))  # type: ignore[index]
    ask(unet)
    assert len(calls) == sum(name.endswith("attn1") for name, _ in unet.named_modules())


def test_two_in_a_chain_are_one_after_the_other(make_unet: Callable[[], UNet2DConditionModel]) -> None:
    """§4.7: two chained hypernetworks equal manual composition, whatever their strengths."""
    unet = make_unet()
    first, second = trained([WIDTH, CONTEXT], 1), trained([CONTEXT], 2)
    first.multiplier, second.multiplier = 0.5, 0.8
    attach(unet, first)
    attach(unet, second)
    with torch.no_grad(), read_by(unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v) as pairs:
        ask(unet)
        ((given, read),) = pairs
        middle = given + 0.5 * first["24"]["v"].linear(given)  # type: ignore[index]
        torch.testing.assert_close(read, middle + 0.8 * second["24"]["v"].linear(middle))  # type: ignore[index]


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_wrappers_of_peft_are_followed(make_unet: Callable[[], UNet2DConditionModel], when: str) -> None:
    """§4.5: hook the wrapper: B A reads what W reads, whenever the LoRA comes, and the order of the chain stays."""

    def lora(unet: UNet2DConditionModel) -> None:
        settings = peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            unet.add_adapter(settings)

    networks = trained([WIDTH, CONTEXT], 1), trained([WIDTH, CONTEXT], 2)
    expected = make_unet()
    lora(expected)
    for network in networks:
        attach(expected, network)
    unet = make_unet()
    steps: dict[str, list[Callable[[], None]]] = {
        "before": [lambda: lora(unet), lambda: attach(unet, networks[0]), lambda: attach(unet, networks[1])],
        "between": [lambda: attach(unet, networks[0]), lambda: lora(unet), lambda: attach(unet, networks[1])],
        "after": [lambda: attach(unet, networks[0]), lambda: attach(unet, networks[1]), lambda: lora(unet)],
    }
    for step in steps[when]:
        step()
    assert torch.equal(ask(unet), ask(expected))
    wrapper = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    assert len(wrapper._forward_pre_hooks) == 1
    assert not wrapper.base_layer._forward_pre_hooks
    plain = make_unet()
    for network in networks:
        attach(plain, network)
    unet.delete_adapters("default")
    assert torch.equal(ask(unet), ask(plain))


def test_fused_projections_are_refused_whenever_they_come(make_unet: Callable[[], UNet2DConditionModel]) -> None:
    """§4.5: not with fused QKV."""
    unet = make_unet()
    unet.fuse_qkv_projections()
    with pytest.raises(UserError, match="fused"):
        attach(unet, trained([CONTEXT]))
    later = make_unet()
    attach(later, trained([CONTEXT]))
    changed = ask(later)
    later.fuse_qkv_projections()
    with pytest.raises(UserError, match="unfuse_qkv_projections"):
        ask(later)
    later.unfuse_qkv_projections()
    assert torch.equal(ask(later), changed)


def test_widths_that_the_model_lacks_are_an_error(tiny_sd: Path) -> None:
    """§4.6: they would train to nothing."""
    with pytest.raises(UserError, match=r"adapter: a hypernetwork of width 768 would never be used: .* read 16$"):
        attached(tiny_sd, sizes=[16, 768])


def test_a_model_without_such_layers_is_an_error() -> None:
    with pytest.raises(UserError, match="no key and value layers"):
        attach(nn.Sequential(nn.Linear(4, 4)), trained([4]))


def test_a_family_that_has_no_such_site_says_why() -> None:
    """§4.5: MMDiT has no meaning of A1111's."""
    together = Unsupported("its layers read prompt and picture together")
    for readers, why in (
        (together, together.reason),
        (("attn2.to_k", "attn2.to_v"), "hypernetworks are files .*U-Net"),
    ):
        sites = SimpleNamespace(readers=readers)
        family: Any = SimpleNamespace(name="other", sites=sites, components={"denoiser": "transformer"})
        with pytest.raises(UserError, match=f"no place in other: {why}"):
            Hypernetworks(config(), family, 0)
