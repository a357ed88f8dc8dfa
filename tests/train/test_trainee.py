"""What a run's engine is given, and who moves it to the device."""

from __future__ import annotations

import torch
from torch import nn

from finetune.train.trainee import Trainee, place

META = torch.device("meta")  # a device that is not the host


def networks() -> nn.ModuleDict:
    made = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("denoiser", "text_encoder", "vae")})
    made.requires_grad_(False)
    made["text_encoder"].requires_grad_(True)
    return made


def moved(found: nn.ModuleDict) -> set[str]:
    return {name for name, network in found.items() if next(network.parameters()).device == META}


def test_all_networks_go_to_the_device() -> None:
    found = networks()
    place(found, META)
    assert moved(found) == {"denoiser", "text_encoder", "vae"}


def test_what_an_engine_cuts_stays_where_it_was_loaded() -> None:
    """It moves one weight after the other itself; whole they may not fit on the device."""
    found = networks()
    place(found, META, but=Trainee(found, lambda _: torch.zeros(()), also=["denoiser"]).networks)
    assert moved(found) == {"vae"}
