"""LoKr, LoHa and OFT: their formulas, and where they have no place (METHODS 1.1, 0.2.4 and 0.2.5)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from injected_layers import answer, attached, base_answer, move
from torch import Tensor
from torch.nn import functional

from finetune.errors import UserError
from finetune.randomness import generator


def loha(parts: Mapping[str, Tensor], scale: float) -> Tensor:
    columns = [
        (parts["hada_w1_a"] @ column1) * (parts["hada_w2_a"] @ column2)
        for column1, column2 in zip(parts["hada_w1_b"].T, parts["hada_w2_b"].T, strict=True)
    ]
    return scale * torch.stack(columns, dim=1)


def lokr(parts: Mapping[str, Tensor], scale: float) -> Tensor:
    second = parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    rows = [torch.cat([value * second.flatten(1) for value in row], dim=1) for row in parts["lokr_w1"]]
    return scale * torch.cat(rows)


@pytest.mark.parametrize("targets", ["attention", "conv"])
@pytest.mark.parametrize(("kind", "rank"), [("loha", 2), ("lokr", 1), ("lokr", 8)])
def test_change_is_the_formula(tiny_sd: Path, kind: str, rank: int, targets: str) -> None:
    """METHODS 1.5, scale: the change is ``alpha / rank`` times the product, on linear layers and convolutions."""
    _, adapter = attached(tiny_sd, kind=kind, rank=rank, alpha=3.0, targets=targets)
    move(adapter, 0.3)
    tensors = adapter.weights().tensors
    for name, layer in adapter.layers.items():
        parts = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        base = layer.get_base_layer()
        delta = {"loha": loha, "lokr": lokr}[kind](parts, 3.0 / rank).reshape(base.weight.shape)
        assert float(parts["alpha"]) == 3.0
        if base.weight.ndim == 4:
            x = torch.randn(1, base.in_channels, 5, 5, generator=generator(0, name))
            wanted = functional.conv2d(x, base.weight + delta, base.bias, base.stride, base.padding)
        else:
            x = torch.randn(3, base.in_features, generator=generator(0, name))
            wanted = functional.linear(x, base.weight + delta, base.bias)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exact", [True, False])
def test_oft_rotates_the_inputs_in_blocks(tiny_sd: Path, exact: bool) -> None:
    """METHODS 1.1: orthogonal where it is exact, and the two rules turn the same numbers opposite ways."""
    _, adapter = attached(tiny_sd, kind="oft", block_size=4, exact=exact, targets="wide")
    move(adapter, 0.05)
    for name, layer in adapter.layers.items():
        base, vectors = layer.get_base_layer(), adapter.parameters()[f"{name}.oft_R"]
        rotations = []
        for vector in vectors:
            skew = torch.zeros(4, 4)
            skew[tuple(torch.triu_indices(4, 4, 1))] = vector
            skew = skew - skew.T
            turn = (torch.eye(4) - skew) @ torch.linalg.inv(torch.eye(4) + skew)
            rotations.append(turn if exact else turn.T)
            torch.testing.assert_close(turn @ turn.T, torch.eye(4), atol=1e-5, rtol=0)
        weight = base.weight.flatten(1) @ torch.block_diag(*rotations).T
        x = torch.randn(3, weight.shape[1], generator=generator(0, name))
        got = layer(x) if base.weight.ndim == 2 else layer(x[:, :, None, None])[:, :, 0, 0]
        torch.testing.assert_close(got, functional.linear(x, weight, base.bias), rtol=1e-3, atol=1e-3)


def test_oft_has_no_place_in_a_convolution_with_a_kernel(tiny_sd: Path) -> None:
    """METHODS 1.5 and 0.2.5: PEFT's answer is wrong there."""
    with pytest.raises(UserError, match=r"adapter\.targets: denoiser\..* is a 3x3 convolution, whose patches overlap"):
        attached(tiny_sd, kind="oft", targets="conv")


def test_a_block_that_does_not_divide_the_inputs_is_refused(tiny_sd: Path) -> None:
    with pytest.raises(
        UserError, match=r"adapter\.block_size: 7 does not divide the 16 inputs of denoiser\..*; 8 does"
    ):
        attached(tiny_sd, kind="oft", block_size=7)


def test_the_flag_of_the_rotation_travels_with_the_weights(tiny_sd: Path) -> None:
    """METHODS 1.1: the same numbers mean another rotation with the other rule."""
    settings = [attached(tiny_sd, kind="oft", exact=exact)[1].weights().settings for exact in (True, False)]
    assert [one["exact"] for one in settings] == ["true", "false"]
    assert [one["algorithm"] for one in settings] == ["oft", "oft"]


def test_foreign_weights_are_refused(tiny_sd: Path) -> None:
    _, adapter = attached(tiny_sd, kind="loha", rank=2)
    good = adapter.weights().tensors
    first = next(iter(good))
    with pytest.raises(UserError, match="missing"):
        adapter.load({name: tensor for name, tensor in good.items() if name != first})
    with pytest.raises(UserError, match="shape"):
        adapter.load({**good, first: torch.zeros(3, 3)})
    alpha = next(name for name in good if name.endswith(".alpha"))
    with pytest.raises(UserError, match="alpha is 5, this adapter has 2"):
        adapter.load({**good, alpha: torch.tensor(5.0)})


@pytest.mark.parametrize("kind", ["lokr", "loha", "oft"])
def test_presets_reach_as_many_layers_as_lora_does(tiny_sd: Path, kind: str) -> None:
    """METHODS 1.5, coverage."""
    family, adapter = attached(tiny_sd, kind=kind, targets="wide")
    assert len(adapter.layers) == 4 * 12
    move(adapter)
    assert not torch.allclose(answer(family), base_answer(tiny_sd), atol=1e-3)
    with pytest.raises(UserError, match=r"adapter\.targets: 'nothing_here' matches nothing"):
        attached(tiny_sd, kind=kind, targets=["attention", "nothing_here"])


@pytest.mark.parametrize("kind", ["lokr", "loha", "oft"])
def test_training_leaves_nothing_to_chance(tiny_sd: Path, kind: str) -> None:
    """PEFT would draw a number for each layer and pass, and leave a layer out, without gradient, where it is 0."""
    family, adapter = attached(tiny_sd, kind=kind)
    move(adapter)
    still = answer(family)
    family.networks.train()
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    assert torch.equal(answer(family), still)
    assert torch.equal(torch.random.get_rng_state(), state)
