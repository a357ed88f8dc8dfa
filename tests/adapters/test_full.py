"""Full and partial fine-tuning: exactly the selected parameters, nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finetune.adapters import attach
from finetune.adapters.full import Full
from finetune.batch import Conditioning
from finetune.config.adapters import FullConfig
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import load_family
from finetune.family import ModelFamily
from finetune.randomness import generator

GEOMETRY = torch.zeros(1, 6, dtype=torch.int64)
TRANSFORMER = "transformer_blocks.0"
BLOCKS = [
    "down_blocks.0.attentions.0",
    "mid_block.attentions.0",
    "up_blocks.1.attentions.0",
    "up_blocks.1.attentions.1",
]
CROSS_KV = {f"denoiser.{block}.{TRANSFORMER}.attn2.{side}.weight" for block in BLOCKS for side in ("to_k", "to_v")}
CROSS = CROSS_KV | {
    f"denoiser.{block}.{TRANSFORMER}.attn2.{rest}"
    for block in BLOCKS
    for rest in ("to_q.weight", "to_out.0.weight", "to_out.0.bias")
}
ATTENTION = CROSS | {name.replace("attn2", "attn1") for name in CROSS}


def attached(folder: Path, **changes: object) -> tuple[ModelFamily, Full]:
    family = load_family(ModelConfig(path=str(folder)))
    adapter = attach(FullConfig(**{"kind": "full", **changes}), family, 0)
    assert isinstance(adapter, Full)
    return family, adapter


def answer(family: ModelFamily) -> Tensor:
    rng = generator(0, "question")
    noisy, tokens = torch.randn(1, 4, 8, 8, generator=rng), torch.randn(1, 24, 16, generator=rng)
    return family.predict(noisy, torch.tensor([300]), Conditioning(tokens=tokens), GEOMETRY)


def train(family: ModelFamily, adapter: Full, steps: int = 5) -> None:
    family.require("text_encoder")
    groups = [{"params": list(group.parameters.values())} for group in adapter.groups()]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
    noisy = torch.randn(1, 4, 8, 8, generator=generator(0, "noisy"))
    for _ in range(steps):
        prompt = family.encode_prompt(["a red star"])
        family.predict(noisy, torch.tensor([300]), prompt, GEOMETRY).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("select", "expected"), [("cross-kv", CROSS_KV), ("cross-attention", CROSS), ("attention", ATTENTION)]
)
def test_a_preset_trains_the_listed_parameters(tiny_sd: Path, select: str, expected: set[str]) -> None:
    family, adapter = attached(tiny_sd, select=select)
    assert set(adapter.parameters) == expected
    assert {name for name, p in family.networks.named_parameters() if p.requires_grad} == expected


@pytest.mark.parametrize("select", ["all", "cross-kv", "norm-bias", [r"^conv_out\.", "mid"], r"time_embedding"])
def test_exactly_the_selected_change(tiny_sd: Path, select: str | list[str]) -> None:
    family, adapter = attached(tiny_sd, select=select)
    family.require("text_encoder", "vae")
    before = {name: p.clone() for name, p in family.networks.named_parameters()}
    train(family, adapter)
    changed = {name for name, p in family.networks.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(adapter.parameters)
    held = {id(p) for group in adapter.groups() for p in group.parameters.values()}
    assert held == {id(p) for p in adapter.parameters.values()}


def test_norms_and_biases_are_all_of_them(tiny_sd: Path) -> None:
    family, adapter = attached(tiny_sd, select="norm-bias")
    every = [name for name, _ in family.networks["denoiser"].named_parameters()]
    expected = {f"denoiser.{name}" for name in every if name.endswith("bias") or re.search(r"norm[^.]*\.weight$", name)}
    assert set(adapter.parameters) == expected


@pytest.mark.parametrize(("select", "embeddings"), [("all", True), ("cross-kv", False)])
def test_text_encoder_trains_beside(tiny_sd: Path, select: str, embeddings: bool) -> None:
    family, adapter = attached(tiny_sd, select=select, text_encoder=True, text_encoder_learning_rate=2e-6)
    names = [group.name for group in adapter.groups()]
    assert names == ["denoiser", "text_encoder"]
    assert [group.learning_rate for group in adapter.groups()] == [None, 2e-6]
    encoder = adapter.groups()[1].parameters
    assert any("token_embedding" in name for name in encoder) == embeddings
    assert any("final_layer_norm" in name for name in encoder)
    before = {name: p.clone() for name, p in encoder.items()}
    train(family, adapter, steps=2)
    assert not any(torch.equal(p, before[name]) for name, p in encoder.items())


def test_disabled_is_the_base_as_on_disk(tiny_sd: Path) -> None:
    family, adapter = attached(tiny_sd)
    with torch.no_grad():
        before = answer(family)
    train(family, adapter)
    with torch.no_grad():
        trained = answer(family)
        with adapter.disabled():
            assert torch.equal(answer(family), before)
        assert torch.equal(answer(family), trained)
    assert not torch.equal(trained, before)
    train(family, adapter, steps=1)
    with torch.no_grad():
        assert not torch.equal(answer(family), trained), "training goes on after the weights were swapped"


def test_disabled_refuses_gradients(tiny_sd: Path) -> None:
    _, adapter = attached(tiny_sd)
    with pytest.raises(RuntimeError, match="no_grad"), adapter.disabled():
        pass


def test_weights_hold_what_was_trained_and_come_back(tiny_sd: Path) -> None:
    family, adapter = attached(tiny_sd, select="cross-kv")
    train(family, adapter)
    saved = adapter.weights()
    assert saved.kind == "full"
    assert saved.settings == {"select": "cross-kv", "text_encoder": "false"}
    assert set(saved.tensors) == CROSS_KV
    again, other = attached(tiny_sd, select="cross-kv")
    other.load(saved.tensors)
    assert torch.equal(answer(again), answer(family))
    with pytest.raises(UserError, match="missing"):
        other.load({})


@pytest.mark.parametrize(
    ("select", "said"),
    [
        ("atention", "did you mean 'attention'"),
        (["mid", "attn3"], "did you mean 'attn"),
        ("[", "no regular expression"),
    ],
)
def test_a_selection_that_matches_nothing_is_named(tiny_sd: Path, select: str | list[str], said: str) -> None:
    with pytest.raises(UserError, match=r"^adapter\.select: ") as caught:
        attached(tiny_sd, select=select)
    assert said in str(caught.value)
