"""Blocks that lie elsewhere and visit: the same numbers, and no weights left behind."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune.adapters import attach
from finetune.config.adapters import LoraConfig
from finetune.config.schema import ModelConfig
from finetune.families import load_family
from finetune.families.block_swap import BlockSwap
from finetune.family import ModelFamily
from finetune.randomness import generator

CPU = torch.device("cpu")


class Stack(nn.Module):
    """Blocks of a layer and a norm each."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()) for _ in range(blocks))
        for name, one in self.named_parameters():
            one.data = torch.randn(one.shape, generator=generator(0, name))
        self.requires_grad_(False)

    def forward(self, states: Tensor, checkpointed: bool = False) -> Tensor:
        for block in self.blocks:
            states = checkpoint(block, states, use_reentrant=False) if checkpointed else block(states)
        return states


def gradient(network: Stack, checkpointed: bool) -> tuple[Tensor, Tensor]:
    states = torch.randn(3, 8, generator=generator(0, "states")).requires_grad_()
    loss = network(states, checkpointed).square().sum()
    loss.backward()
    assert states.grad is not None
    return loss.detach(), states.grad


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("swapped", [1, 4])
def test_losses_and_gradients_are_bit_equal(checkpointed: bool, swapped: int) -> None:
    plain, moved = Stack(), Stack()
    BlockSwap(moved.blocks[-swapped:], CPU)
    for _ in range(2):
        for ours, theirs in zip(gradient(moved, checkpointed), gradient(plain, checkpointed), strict=True):
            assert torch.equal(ours, theirs)


def test_swapped_tensors_are_no_parameters_and_lie_where_they_lay() -> None:
    network = Stack(2)
    first = network.blocks[1][0].weight.data_ptr()
    swap = BlockSwap(network.blocks[1:], CPU)
    assert {name.split(".")[1] for name, _ in network.named_parameters()} == {"0"}
    assert swap.bytes == 4 * (8 * 8 + 8 + 8 + 8)
    gradient(network, True)
    assert network.blocks[1][0].weight.data_ptr() == first


def test_a_copy_is_gone_when_its_block_is_done() -> None:
    network = Stack()
    BlockSwap(network.blocks, CPU)
    alive: list[int] = []
    noted: list[weakref.ref[torch.UntypedStorage]] = []

    def note(layer: nn.Module, *_: object) -> None:
        gc.collect()
        noted.append(weakref.ref(layer.weight.untyped_storage()))  # type: ignore[union-attr, operator]
        alive.append(sum(one() is not None for one in noted))

    for block in network.blocks:
        block[0].register_forward_hook(note)
    gradient(network, True)
    assert len(alive) == 8  # each block twice: forward, and again for its gradients
    assert max(alive) <= 2  # that of the block, and that of the one whose gradients have just been made


def trained(folder: Path, swap: int) -> tuple[ModelFamily, dict[str, Tensor], list[float]]:
    torch.set_num_threads(1)
    family = load_family(ModelConfig(path=str(folder), block_swap=swap))
    family.require("denoiser", "text_encoder")
    adapter = attach(LoraConfig(kind="lora", rank=2), family, 0)
    family.enable_gradient_checkpointing()
    family.networks["denoiser"].train()
    weights = {name: one for group in adapter.groups() for name, one in group.parameters.items()}
    optimizer, losses = torch.optim.SGD(weights.values(), lr=0.1), []
    for step in range(3):
        with torch.no_grad():
            prompt = family.encode_prompt(["a red star"])
        noisy = torch.randn(2, 4, 8, 8, generator=generator(0, "noisy", step))
        prompt = type(prompt).stack([prompt, prompt])
        loss = family.predict(noisy, torch.tensor([300, 30]), prompt, torch.zeros(2, 6)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return family, {name: one.detach() for name, one in weights.items()}, losses


def test_a_lora_trains_to_the_same_bits(tiny_sd: Path) -> None:
    _, plain, losses = trained(tiny_sd, 0)
    family, swapped, same = trained(tiny_sd, 3)
    assert losses == same
    assert plain.keys() == swapped.keys()
    assert all(torch.equal(plain[name], swapped[name]) for name in plain)
    held = [name for name, _ in family.networks["denoiser"].named_parameters() if "transformer_blocks" in name]
    assert any("lora" not in name for name in held)  # of the block that was not swapped
    assert len({name.split("transformer_blocks")[0] for name in held if "lora" not in name}) == 1


def test_pictures_are_the_same(tiny_sd: Path) -> None:
    drawn = []
    for swap in (0, 99):
        pipeline = load_family(ModelConfig(path=str(tiny_sd), block_swap=swap)).pipeline()
        pipeline.set_progress_bar_config(disable=True)
        rng = generator(0, "picture")
        drawn.append(pipeline("a star", num_inference_steps=2, height=16, width=16, generator=rng).images[0].tobytes())
    assert drawn[0] == drawn[1]
