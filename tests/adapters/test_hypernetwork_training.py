"""What learns in a hypernetwork and what stays, and how it comes back (METHODS 4)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypernetworks import answer, attached, config, read_by

from finetune.adapters import attach as attach_adapter
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import load_family
from finetune.randomness import generator


def test_only_the_hypernetwork_learns(tiny_sd: Path) -> None:
    """§4.7: gradients on its parameters alone; the model stays as it is."""
    family, adapter = attached(tiny_sd, activation="swish", layer_norm=True)
    (group,) = adapter.groups()
    assert group.parameters.keys() == {
        f"hypernetwork.16.{role}.linear.{place}.{what}"
        for role in ("k", "v")
        for place in (0, 2, 3, 4)
        for what in ("weight", "bias")
    }
    base = {name: p.clone() for name, p in family.networks["denoiser"].named_parameters()}
    optimizer = torch.optim.AdamW(group.parameters.values(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        answer(family).square().mean().backward()
        with_gradient = {id(p) for p in family.networks.parameters() if p.grad is not None}
        assert with_gradient == {id(p) for p in group.parameters.values()}
        optimizer.step()
        optimizer.zero_grad()
    after = dict(family.networks["denoiser"].named_parameters())
    assert all(torch.equal(after[name], value) for name, value in base.items())
    assert adapter.networks() == {"hypernetwork"}
    assert not any("hypernetwork" in name for name in family.networks["denoiser"].state_dict())


def test_disabled_is_the_untouched_model(tiny_sd: Path) -> None:
    family = load_family(ModelConfig(path=str(tiny_sd)))
    family.require("denoiser")
    before = answer(family)
    adapter = attach_adapter(config(init="xavier_normal"), family, 0)
    assert not torch.equal(changed := answer(family), before)
    with adapter.disabled():
        assert torch.equal(answer(family), before)
        family.networks["hypernetwork"].train()
        assert torch.equal(answer(family), before)
    assert torch.equal(answer(family), changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_computes_in_float32_on_a_half_base(dtype: torch.dtype, tiny_sd: Path) -> None:
    """§4.6: modules stay in float32, and the denoiser gets its own dtype back."""
    family = load_family(ModelConfig(path=str(tiny_sd)))
    family.require("denoiser")
    family.networks["denoiser"].to(dtype)
    adapter = attach_adapter(config(init="xavier_normal"), family, 0)
    assert {p.dtype for p in adapter.groups()[0].parameters.values()} == {torch.float32}
    layer = family.networks["denoiser"].get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_k")
    with torch.no_grad(), read_by(layer) as pairs:
        layer(torch.randn(2, 3, 16, generator=generator(0, "half")).to(dtype))
        ((given, read),) = pairs
        mlp = family.networks["hypernetwork"]["16"]["k"]  # type: ignore[index]
        assert torch.equal(read, (given.float() + mlp.linear(given.float())).to(dtype))


def test_dropout_acts_while_training_only(tiny_sd: Path) -> None:
    family, _ = attached(tiny_sd, init="xavier_normal", dropout=[0, 0.5, 0])
    family.networks.eval()
    assert torch.equal(answer(family), answer(family))
    family.networks["hypernetwork"].train()
    assert not torch.equal(answer(family), answer(family))


def test_gradient_checkpointing_changes_no_gradient(tiny_sd: Path) -> None:
    """What is trained stands outside of the blocks that are computed again."""
    gradients = []
    for saving in (False, True):
        family, adapter = attached(tiny_sd, init="xavier_normal")
        if saving:
            family.enable_gradient_checkpointing()
        answer(family).square().mean().backward()
        gradients.append({name: p.grad for name, p in adapter.groups()[0].parameters.items()})
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())


def test_weights_come_back_bit_for_bit(tiny_sd: Path) -> None:
    family, adapter = attached(tiny_sd, init="xavier_normal", activation="mish", layers=[1, 0.5, 1])
    saved = adapter.weights()
    again, other = attached(tiny_sd, seed=9, activation="mish", layers=[1, 0.5, 1])
    other.load(saved.tensors)
    assert torch.equal(answer(again), answer(family))
    assert (saved.kind, saved.settings["layers"], saved.settings["activation"]) == (
        "hypernetwork",
        "[1.0, 0.5, 1.0]",
        "mish",
    )
    name = "hypernetwork.16.k.linear.0.weight"
    with torch.no_grad():
        adapter.groups()[0].parameters[name].zero_()
    assert bool(saved.tensors[name].any()), "weights are no copies"


def test_foreign_weights_are_refused(tiny_sd: Path) -> None:
    _, adapter = attached(tiny_sd)
    good = adapter.weights().tensors
    name = "hypernetwork.16.k.linear.0.weight"
    with pytest.raises(UserError, match="missing"):
        adapter.load({key: tensor for key, tensor in good.items() if key != name})
    with pytest.raises(UserError, match="unknown"):
        adapter.load({**good, "hypernetwork.32.k.linear.0.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="shape"):
        adapter.load({**good, name: torch.zeros(8, 16)})


def test_other_networks_come_and_go_around_it(tiny_sd: Path) -> None:
    """Sampling loads and frees the parts of the model that it needs; the extra network is none of them."""
    family, adapter = attached(tiny_sd, init="xavier_normal")
    before = answer(family)
    family.pipeline()
    family.release("vae", "text_encoder")
    assert set(family.networks) == {"denoiser", "hypernetwork"}
    assert torch.equal(answer(family), before)
    family.release(*list(family.networks))
    family.require("denoiser")
    assert not torch.equal(answer(family), before)
    assert adapter.groups()[0].parameters
