"""What a run's engine is given, and who moves it to the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from finetune.train.trainee import Trainee, place

META, HOST = torch.device("meta"), torch.device("cpu")  # a device that is not the host


def networks() -> nn.ModuleDict:
    made = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("denoiser", "text_encoder", "vae")})
    made.requires_grad_(False)
    made["text_encoder"].requires_grad_(True)
    return made


def where(found: nn.ModuleDict) -> dict[str, str]:
    return {name: next(network.parameters()).device.type for name, network in found.items()}


@pytest.mark.parametrize(
    ("loading", "also", "moved"),
    [
        (META, [], {"denoiser", "text_encoder", "vae"}),  # DDP
        (META, ["denoiser"], {"denoiser", "text_encoder", "vae"}),  # ZeRO-3, which cuts what is on the device
        (HOST, ["denoiser"], {"vae"}),  # FSDP2 moves the others itself, block by block
    ],
)
def test_what_an_engine_moves_itself_stays_on_the_host(loading: Any, also: list[str], moved: set[str]) -> None:
    found = networks()
    place(found, Trainee(found, lambda _: torch.zeros(()), also=also), META, loading)
    assert {name for name, device in where(found).items() if device == "meta"} == moved
