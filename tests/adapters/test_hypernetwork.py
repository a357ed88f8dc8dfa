"""Networks as A1111 builds them: their modules, activations and starts (METHODS 4)."""

from __future__ import annotations

import inspect
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypernetworks import DROP, LINEAR, NORM, RELU, SWISH, answer, attached, config
from torch import nn

from finetune.adapters import attach as attach_adapter
from finetune.config.adapters import Activation
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import load_family
from finetune.hypernet import ACTIVATIONS, REFUSED, Hypernetwork, Structure, initialise
from finetune.randomness import generator


@pytest.mark.parametrize(
    ("structure", "modules"),
    [
        (Structure(), [LINEAR, LINEAR]),
        (Structure(activation="relu"), [LINEAR, RELU, LINEAR]),
        (
            Structure(activation="swish", layer_norm=True, dropout=(0, 0.3, 0)),
            [LINEAR, SWISH, NORM, DROP, LINEAR, NORM],
        ),
        (
            Structure((1, 2, 2, 1), "relu", activate_output=True),
            [LINEAR, RELU, LINEAR, RELU, LINEAR, RELU],
        ),
        (
            Structure((1, 1.5, 2, 1), "leakyrelu", dropout=(0, 0.05, 0, 0)),
            [LINEAR, nn.LeakyReLU, DROP, LINEAR, nn.LeakyReLU, LINEAR],
        ),
        (Structure(activation="linear", activate_output=True, layer_norm=True), [LINEAR, NORM, LINEAR, NORM]),
    ],
)
def test_modules_stand_in_the_order_of_the_table(structure: Structure, modules: list[type[nn.Module]]) -> None:
    """§4.7: the built network matches the table of layers."""
    built = structure.build(10)
    assert [type(module) for module in built] == modules
    sizes = [int(10 * share) for share in structure.layers]
    linears = [module for module in built if isinstance(module, nn.Linear)]
    assert [(module.in_features, module.out_features) for module in linears] == list(pairwise(sizes))
    assert all(module.bias is not None for module in linears)


def test_activations_are_torch_s_by_their_lower_case_names() -> None:
    """§4.2: every class of torch.nn.modules.activation has a place, or a reason to have none; recipes know the same."""
    classes = inspect.getmembers(torch.nn.modules.activation, inspect.isclass)
    own = {name.lower() for name, kind in classes if kind.__module__ == "torch.nn.modules.activation"}
    assert own == (ACTIVATIONS.keys() | REFUSED) - {"linear", "swish"}
    assert set(get_args(Activation)) == ACTIVATIONS.keys()
    assert ACTIVATIONS["swish"] is nn.Hardswish
    for name in ACTIVATIONS:
        structure = Structure(activation=name, activate_output=True)
        network = initialise(Hypernetwork(structure, [8]), "xavier_normal", 0).eval()
        states = torch.randn(2, 3, 8, generator=generator(0, name))
        assert network.change("k", states).shape == states.shape
        torch.testing.assert_close(
            network.change("k", states)[:1], network.change("k", states[:1]), msg="mixes pictures"
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": (2, 1)}, "begin and end with 1"),
        ({"layers": (1,)}, "begin and end with 1"),
        ({"activation": "sigmoidd"}, "did you mean 'sigmoid'"),
        ({"activation": "softmax"}, "no activation 'softmax'"),
        ({"dropout": (0, 0.3)}, "3 shares"),
        ({"dropout": (0, 0.3, 0.3)}, "first and the last 0"),
        ({"dropout": (0, 1.0, 0)}, "below 1"),
    ],
)
def test_a_structure_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Structure(**changes)
    with pytest.raises(UserError, match="leaves nothing"):
        Structure(layers=(1, 0.01, 1)).build(16)


@pytest.mark.parametrize("width", [96, 320, 768])
def test_deviation_at_the_start(width: int) -> None:
    """§4.7: within 10 % of 1.41e-4 * d for a linear network drawn normally."""
    network = initialise(Hypernetwork(Structure(), [width]), "normal", 0).eval()
    states = torch.randn(64, width, generator=generator(0, "states"))
    with torch.no_grad():
        moved = (network.change("k", states) - states).norm(dim=1) / states.norm(dim=1)
    assert float(moved.mean()) == pytest.approx(1.41e-4 * width, rel=0.1)


@pytest.mark.parametrize(
    ("rule", "activation", "std"),
    [
        ("normal", "relu", 0.01),
        ("xavier_uniform", "relu", (2 / (256 + 512)) ** 0.5),
        ("xavier_normal", "relu", (2 / (256 + 512)) ** 0.5),
        ("kaiming_uniform", "relu", (2 / 256) ** 0.5),
        ("kaiming_normal", "leakyrelu", (2 / 256) ** 0.5),
    ],
)
def test_start_is_distributed_as_said(rule: str, activation: str, std: float) -> None:
    """§4.2: the rule is for linear weights; layer norms are N(0, 0.01) whatever it is, and biases 0."""
    structure = Structure(activation=activation, layer_norm=True)
    network = initialise(Hypernetwork(structure, [256]), rule, 0)
    linear, norm = network["256"]["k"].linear[0], network["256"]["k"].linear[2]  # type: ignore[index]
    assert float(linear.weight.detach().std()) == pytest.approx(std, rel=0.02)
    assert float(norm.weight.detach().std()) == pytest.approx(0.01, rel=0.15)
    assert abs(float(norm.weight.detach().mean())) < 0.002
    assert not any(bool(value.any()) for name, value in network.named_parameters() if name.endswith("bias"))
    uniform = float(linear.weight.detach().abs().max()) < 1.75 * std
    assert uniform == rule.endswith("uniform")


def test_start_is_named_by_seed_and_module(tiny_sd: Path) -> None:
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first = attached(tiny_sd, 5)[1].weights().tensors
    assert torch.equal(torch.random.get_rng_state(), state), "torch's own generator was used"
    again, other = attached(tiny_sd, 5)[1].weights().tensors, attached(tiny_sd, 6)[1].weights().tensors
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    assert not any(torch.equal(other[name], first[name]) for name in first if name.endswith("weight"))
    one, more = (initialise(Hypernetwork(Structure(), sizes), "normal", 5).state_dict() for sizes in ([16], [8, 16]))
    assert all(torch.equal(more[name], tensor) for name, tensor in one.items())
    assert not torch.equal(one["16.k.linear.0.weight"], one["16.v.linear.0.weight"])


@pytest.mark.parametrize("structure", [{}, {"layer_norm": True, "activation": "relu", "activate_output": True}])
def test_zero_last_begins_at_the_untouched_model_and_learns(tiny_sd: Path, structure: dict[str, Any]) -> None:
    """§4.2: the extra option, compatible with files of A1111."""
    family = load_family(ModelConfig(path=str(tiny_sd)))
    family.require("denoiser")
    before = answer(family)
    adapter = attach_adapter(config(zero_last=True, **structure), family, 0)
    assert torch.equal(answer(family), before)
    parameters = list(adapter.groups()[0].parameters.values())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        answer(family).square().mean().backward()
        optimizer.step()
    assert all(bool(parameter.grad.any()) for parameter in parameters)
