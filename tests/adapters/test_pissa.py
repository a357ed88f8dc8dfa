"""PiSSA: factors that begin inside the weight (METHODS 1.1)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from injected_layers import answer, attached, base_answer, move

from finetune.errors import UserError
from finetune.export.layers import applied, layers
from finetune.randomness import generator

PISSA = {"kind": "lora", "rank": 4, "alpha": 2.0, "init": "pissa", "targets": "conv"}


def test_base_and_change_are_the_weight_at_first(tiny_sd: Path) -> None:
    """METHODS 1.5, identity: within 1e-5, and the change holds the largest singular values."""
    family, adapter = attached(tiny_sd, **PISSA)
    assert float((answer(family) - base_answer(tiny_sd)).detach().abs().max()) < 1e-5
    for name, layer in adapter.layers.items():
        with adapter.disabled():
            original = layer.get_base_layer().weight.detach().clone()
        values = torch.linalg.svdvals(original.flatten(1))
        found = torch.linalg.svdvals(layer.get_delta_weight("default").flatten(1))
        torch.testing.assert_close(found[:4], values[:4], rtol=1e-4, atol=1e-5, msg=name)
        left = torch.linalg.svdvals(layer.get_base_layer().weight.flatten(1))
        torch.testing.assert_close(left[: len(values) - 4], values[4:], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_exported_factors_belong_to_the_original_base(tiny_sd: Path, use_rslora: bool, use_dora: bool) -> None:
    """METHODS 1.5, PiSSA export: a LoRA of twice the rank on the original equals the trained model to 1e-4."""
    family, adapter = attached(tiny_sd, **PISSA, use_rslora=use_rslora, use_dora=use_dora)
    move(adapter)
    found = layers(adapter.weights())
    assert {layer.rank for layer in found} == {8}
    base, _ = attached(tiny_sd, kind="full")
    with applied(dict(base.networks.items()), found):
        torch.testing.assert_close(answer(base), answer(family), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(answer(family), base_answer(tiny_sd), atol=1e-2)


def test_untouched_it_exports_no_change(tiny_sd: Path) -> None:
    _, adapter = attached(tiny_sd, **PISSA)
    tensors = adapter.weights().tensors
    for name in adapter.layers:
        product = tensors[f"{name}.lora_B.weight"].flatten(1) @ tensors[f"{name}.lora_A.weight"].flatten(1)
        assert float(product.abs().max()) < 1e-6


def test_the_residual_is_the_same_every_time(tiny_sd: Path) -> None:
    """A resumed run loads factors alone; the base that they belong to is made anew."""
    (one, first), (two, second) = attached(tiny_sd, 1, **PISSA), attached(tiny_sd, 2, **PISSA)
    assert all(
        torch.equal(layer.get_base_layer().weight, second.layers[name].get_base_layer().weight)
        for name, layer in first.layers.items()
    )
    move(first)
    trained = {name: parameter.detach().clone() for name, parameter in first.parameters().items()}
    with torch.no_grad():
        for name, parameter in second.parameters().items():
            parameter.copy_(trained[name])
    assert torch.equal(answer(one), answer(two))


def test_factors_of_another_base_are_refused(tiny_sd: Path, tiny_sd_v: Path) -> None:
    settings = {**PISSA, "targets": "attention"}
    _, adapter = attached(tiny_sd, **settings)
    other = adapter.weights().tensors
    name = next(iter(adapter.layers))
    other[f"{name}.lora_A.weight"] = other[f"{name}.lora_A.weight"] + 1e-3
    with pytest.raises(UserError, match="began at other singular vectors"):
        adapter.load(other)


def test_a_rank_beyond_the_layer_is_refused(tiny_sd: Path) -> None:
    with pytest.raises(UserError, match=r"adapter\.rank: denoiser\..* has only 16 singular values, fewer than 17"):
        attached(tiny_sd, **{**PISSA, "rank": 17, "targets": "attention"})


def test_strength_goes_from_the_base_to_what_was_trained(tiny_sd: Path) -> None:
    _, adapter = attached(tiny_sd, **{**PISSA, "targets": "attention"})
    move(adapter)
    for name, layer in adapter.layers.items():
        x = torch.randn(3, layer.in_features, generator=generator(0, name))
        with adapter.disabled():
            base = layer(x)
        whole = layer(x)
        with adapter.scaled(0.0):
            assert torch.equal(layer(x), base)
        with adapter.scaled(0.5):
            torch.testing.assert_close(layer(x), (base + whole) / 2, rtol=1e-4, atol=1e-5)
        assert torch.equal(layer(x), whole)


def test_weight_decay_does_not_draw_to_the_residual(tiny_sd: Path) -> None:
    """METHODS 1.4.6: decay draws to the base, which for these factors is not zero."""
    assert not any(group.decays for group in attached(tiny_sd, **PISSA)[1].groups())


def test_the_base_is_not_put_back_where_processes_hold_it_in_pieces(tiny_sd: Path) -> None:
    _, adapter = attached(tiny_sd, **PISSA)
    _, plain = attached(tiny_sd, **{**PISSA, "init": "kaiming"})
    for one in (adapter, plain):
        one.share_networks()
    with plain.disabled():
        pass
    with (
        pytest.raises(UserError, match=r"adapter\.init: pissa does not work.*take images, or zero2"),
        adapter.disabled(),
    ):
        pass
