"""Skeletons live as long as real tensors: what is counted on them is what a real pass holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.adapters import attach
from finetune.config.adapters import LoraConfig
from finetune.config.schema import ModelConfig
from finetune.families import load_family
from finetune.family import ModelFamily
from finetune.plan.simulation import Live, inference_bytes, skeletal, step_bytes
from finetune.plan.skeleton import fill


class Chain(nn.Module):
    """Two layers, each of which keeps what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(2))

    def forward(self, states: Tensor) -> Tensor:
        for layer in self.layers:
            states = layer(states)
        return states


def test_a_chain_holds_what_one_can_count_by_hand() -> None:
    with torch.device("meta"):
        chain = Chain()
    states, weight = 4 * 1024 * 64, 4 * 64 * 64
    for layer in chain.layers[:1]:
        layer.requires_grad_(False)
    found = step_bytes(chain, lambda: chain(torch.empty(1024, 64)), None, accumulated=False)
    # what went in, what the first layer gave, which the second's weight needs for its gradient; what came out
    assert 3 * states <= found <= 4 * states + 2 * weight


def test_tensors_that_are_gone_do_not_count() -> None:
    with torch.device("meta"), Live(nn.Module()) as live:
        first = torch.empty(100)
        second = first + 1
        assert live.now == 800
        del first
        view = second[:10]
        assert live.now == 400
        del second, view
        assert (live.now, live.peak) == (0, 800)


def test_without_gradients_nothing_is_kept() -> None:
    with torch.device("meta"):
        chain = Chain()
    assert inference_bytes(chain, lambda: chain(torch.empty(1024, 64))) <= 3 * 4 * 1024 * 64


def made(folder: Path, real: bool, checkpointing: bool, **model: object) -> ModelFamily:
    torch.set_num_threads(1)
    family = load_family(ModelConfig.model_validate({"path": str(folder), **model}))
    family.require("denoiser", "vae", "text_encoder") if real else fill(family, folder)
    attach(LoraConfig(kind="lora", rank=4, text_encoder=True), family, 0)
    if checkpointing:
        family.enable_gradient_checkpointing()
    family.networks.train()
    return family


def asked(family: ModelFamily, size: int = 3) -> Tensor:
    prompt = family.encode_prompt(["a red star"] * size)
    return family.predict(torch.zeros(size, 4, 8, 8), torch.zeros(size), prompt, torch.zeros(size, 6))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "model", [{}, {"dtype": "bfloat16"}, {"quantize": {"kind": "nf4"}}], ids=["float", "bf16", "nf4"]
)
def test_a_step_on_skeletons_holds_what_a_real_one_does(
    tiny_sd: Path, model: Mapping[str, Any], checkpointing: bool
) -> None:
    real, bare = (made(tiny_sd, kind, checkpointing, **model) for kind in (True, False))
    with Live(real.networks) as live:
        asked(real).sum().backward()
    assert step_bytes(bare.networks, lambda: asked(bare), None, False) == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_in_mixed_precision_holds_what_a_real_one_does(tiny_sd: Path, checkpointing: bool) -> None:
    real, bare = (made(tiny_sd, kind, checkpointing) for kind in (True, False))
    with Live(real.networks) as live:
        with torch.autocast("cpu", torch.bfloat16):
            loss = asked(real).sum()
        loss.backward()
    counted = step_bytes(bare.networks, lambda: asked(bare), torch.bfloat16, False)
    assert counted == pytest.approx(live.peak, rel=0.25)  # a CPU runs norms in 16 bits, a GPU does not


def test_checkpointing_holds_less(tiny_sd: Path) -> None:
    plain, frugal = (made(tiny_sd, False, checkpointing) for checkpointing in (False, True))
    assert step_bytes(frugal.networks, lambda: asked(frugal), None, False) < 0.6 * step_bytes(
        plain.networks, lambda: asked(plain), None, False
    )


def test_gradients_that_wait_for_another_pass_are_counted(tiny_sd: Path) -> None:
    bare = made(tiny_sd, False, False)
    gradients = sum(4 * one.numel() for one in bare.networks.parameters() if one.requires_grad)
    once, twice = (step_bytes(bare.networks, lambda: asked(bare), None, more) for more in (False, True))
    assert 0 < twice - once <= gradients


def test_torch_is_as_it_was(tiny_sd: Path) -> None:
    before = [nn.functional.linear, nn.functional.scaled_dot_product_attention, torch.matmul]
    with skeletal(torch.bfloat16):
        assert nn.functional.linear is not before[0]
    assert [nn.functional.linear, nn.functional.scaled_dot_product_attention, torch.matmul] == before
