"""DoRA: lengths and directions (METHODS 1.1)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from injected_layers import answer, attached, base_answer, move
from torch.nn import functional

from finetune.config.optimizer import AdamWConfig
from finetune.randomness import generator
from finetune.train.optimizers import build_optimizer

DORA = {"kind": "lora", "rank": 4, "alpha": 6.0, "use_dora": True, "targets": "conv"}


def test_the_weight_is_the_direction_at_the_trained_length(tiny_sd: Path) -> None:
    """METHODS 1.1: ``m (W + s B A) / ||W + s B A||``, the norm over inputs and kernel, one length per output."""
    _, adapter = attached(tiny_sd, **DORA)
    move(adapter)
    tensors = adapter.weights().tensors
    for name, layer in adapter.layers.items():
        base = layer.get_base_layer()
        a, b = (tensors[f"{name}.lora_{half}.weight"].flatten(1) for half in "AB")
        length = tensors[f"{name}.lora_magnitude_vector.weight"]
        assert length.shape == ((len(b),) if base.weight.ndim == 2 else (1, len(b), 1, 1))
        moved = base.weight.flatten(1) + 6 / 4 * b @ a
        weight = (length.view(-1, 1) * moved / moved.norm(dim=1, keepdim=True)).view(base.weight.shape)
        if base.weight.ndim == 4:
            x = torch.randn(2, base.in_channels, 6, 6, generator=generator(0, name))
            wanted = functional.conv2d(x, weight, base.bias, base.stride, base.padding)
        else:
            x = torch.randn(3, base.in_features, generator=generator(0, name))
            wanted = functional.linear(x, weight, base.bias)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)


def test_no_gradient_goes_through_the_norm(tiny_sd: Path) -> None:
    """Section 4.3 of the paper: with the norm held constant, scaling a row's B changes the output by that much."""
    _, adapter = attached(tiny_sd, **{**DORA, "targets": r"mid_block\..*attn1\.to_q"})
    move(adapter)
    layer = next(iter(adapter.layers.values()))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    length, weight = layer.lora_magnitude_vector["default"].weight, layer.get_base_layer().weight
    x = torch.randn(3, layer.in_features, generator=generator(0, "x"))
    layer(x).sum().backward()
    norm = (weight + 1.5 * b @ a).norm(dim=1).detach()
    wanted = (length / norm)[:, None] * 1.5 * (x @ a.T).sum(0)
    torch.testing.assert_close(b.grad, wanted, rtol=1e-4, atol=1e-5)


def test_lengths_are_a_group_without_weight_decay(tiny_sd: Path) -> None:
    """METHODS 1.1, LoRA+: numbers of one axis are not decayed, and learn as fast as B."""
    _, adapter = attached(tiny_sd, **DORA, lora_plus_ratio=16.0)
    slow, fast, lengths = adapter.groups()
    assert (slow.factor, fast.factor, lengths.factor) == (1.0, 16.0, 16.0)
    assert slow.decays and fast.decays and not lengths.decays
    assert len(lengths.parameters) == len(adapter.layers)
    assert [group.factor for group in attached(tiny_sd, **DORA)[1].groups()] == [1.0, 1.0]
    optimizer = build_optimizer(AdamWConfig(weight_decay=0.1), adapter.groups(), 1e-3)
    assert [(group["weight_decay"], group["peak"]) for group in optimizer.param_groups] == [
        (0.1, 1e-3),
        (0.1, 16e-3),
        (0.0, 16e-3),
    ]


@pytest.mark.parametrize("targets", ["attention", "conv"])
def test_merged_answers_alike_and_restores_the_base(tiny_sd: Path, targets: str) -> None:
    """METHODS 1.5, merge."""
    family, adapter = attached(tiny_sd, **{**DORA, "targets": targets})
    move(adapter)
    unmerged = answer(family)
    with adapter.merged():
        torch.testing.assert_close(answer(family), unmerged, rtol=1e-4, atol=1e-4)
    assert torch.equal(answer(family), unmerged)
    with adapter.disabled():
        assert torch.equal(answer(family), base_answer(tiny_sd))
