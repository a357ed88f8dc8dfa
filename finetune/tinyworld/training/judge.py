"""Training of the judge: cross-entropy of the factors, and a supervised contrastive loss over random individuals."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.tinyworld.judge import Judge
from finetune.tinyworld.training import data
from finetune.tinyworld.training.fit import Plan, fit
from finetune.tinyworld.vision import spoil
from finetune.tinyworld.world import FACTORS

TEMPERATURE = 0.15
OF_INDIVIDUALS = ("shape", "background", "position", "size")  # their colours and fill have no name


def tell_apart(features: Tensor) -> Tensor:
    """InfoNCE: rows 2k and 2k+1 of the unit vectors (B, 64) show one individual, all others differ."""
    similar = features @ features.T / TEMPERATURE
    similar = similar.masked_fill(torch.eye(len(features), dtype=torch.bool), float("-inf"))
    return nn.functional.cross_entropy(similar, torch.arange(len(features)) ^ 1)


def attribute_loss(logits: dict[str, Tensor], factors: Tensor, individual: Tensor) -> Tensor:
    """Mean cross-entropy of the factors (B, 6); pictures of individuals don't count for colour and fill."""
    losses = []
    for at, name in enumerate(FACTORS):
        each = nn.functional.cross_entropy(logits[name], factors[:, at], reduction="none")
        counts = torch.ones_like(each) if name in OF_INDIVIDUALS else (~individual).float()
        losses.append((each * counts).sum() / counts.sum().clamp(min=1))
    return torch.stack(losses).mean()


def train(folder: Path, steps: int, batch: int, seed: int) -> None:
    """Train to ``folder/model``: half of each batch plain scenes, half pairs of pictures of individuals."""
    scenes = data.training_scenes(folder.parent / "data")
    individuals = data.training_individuals(folder.parent / "data")
    torch.manual_seed(seed)
    judge = Judge()

    def loss_of(network: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        assert isinstance(network, Judge)
        plain = torch.randint(len(scenes), (batch // 2,), generator=generator).tolist()
        first = torch.randperm(len(individuals) // 2, generator=generator)[: batch // 4] * 2
        pairs = torch.stack([first, first + 1], 1).flatten().tolist()
        rows = [(scenes, row) for row in plain] + [(individuals, row) for row in pairs]
        pictures = torch.stack([torch.from_numpy(of.pictures[row].copy()) for of, row in rows])
        factors = torch.stack([torch.from_numpy(of.factors[row].copy()) for of, row in rows])
        individual = torch.arange(len(rows)) >= len(plain)
        seen = spoil(pictures.permute(0, 3, 1, 2).float() / 255, generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits, features = network.look(seen)
        read = {name: value.float() for name, value in logits.items()}
        return attribute_loss(read, factors, individual) + 0.5 * tell_apart(features.float()[individual])

    averaged = fit(judge, loss_of, Plan(steps, 2e-3, warmup=steps // 20, average=0.99, decay=0.02, seed=seed), folder)
    (folder / "model").mkdir(parents=True, exist_ok=True)
    weights = {key: value.half().contiguous() for key, value in averaged.state_dict().items()}
    save_file(weights, folder / "model" / "judge.safetensors")
