"""Is the judge to be trusted, and is the base any good? Figures with their limits (docs/tinyworld.md shows them)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.tinyworld import captions, world
from finetune.tinyworld.judge import Judge, as_tensor
from finetune.tinyworld.subject import Subject, subject
from finetune.tinyworld.unseen import UNSEEN, unseen_captions
from finetune.tinyworld.world import FACTORS, Scene

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass(frozen=True, slots=True)
class Gate:
    """A figure and the limit that it has to reach (``at_least``) or to stay under."""

    name: str
    value: float
    limit: float
    at_least: bool = True

    @property
    def passed(self) -> bool:
        """Whether the figure is on the right side of its limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"passed": self.passed}


def accuracy_by_factor(judge: Judge, pictures: Any, named: list[dict[str, str]]) -> dict[str, float]:
    """Share of the named values that the judge reads, for each factor and as "all", the mean over everything named."""
    read = judge.attribute_names(pictures)
    hits: dict[str, list[bool]] = {name: [] for name in FACTORS}
    for seen, wanted in zip(read, named, strict=True):
        for name, value in wanted.items():
            hits[name].append(seen[name] == value)
    everything = [hit for values in hits.values() for hit in values]
    return {name: sum(v) / len(v) for name, v in {**hits, "all": everything}.items() if v}


def judge_gates(judge: Judge, vae: AutoencoderKL, count: int = 512, individuals: int = 64) -> list[Gate]:
    """The judge on pictures it never saw, as drawn and after the autoencoder (METHODS: validity before use)."""
    scenes = [Scene.draw(UNSEEN, index) for index in range(count)]
    factors = [scene.factors for scene in scenes]
    drawn = as_tensor([world.render(scene)[0] for scene in scenes])
    plain, decoded = _accuracies(judge, drawn, factors), _accuracies(judge, round_trip(vae, drawn), factors)
    cast = [subject(10_000 + index) for index in range(individuals)]
    seen = as_tensor([one.render(scene)[0] for one in cast for scene in _two_scenes(one)])
    same, other = likeness(judge.embed(seen), cast)
    same_decoded, other_decoded = likeness(judge.embed(round_trip(vae, seen)), cast)
    return [
        Gate("attribute accuracy, worst factor", min(plain.values()), 0.97),
        Gate("attribute accuracy, all", plain["all"], 0.99),
        Gate("attribute accuracy lost by the autoencoder", plain["all"] - decoded["all"], 0.05, at_least=False),
        Gate("same minus other individual of the class, cosine", same - other, 0.4),
        Gate("the same, changed by the autoencoder", abs(same - other - same_decoded + other_decoded), 0.05, False),
    ]


def _accuracies(judge: Judge, pictures: Tensor, factors: list[dict[str, str]]) -> dict[str, float]:
    return accuracy_by_factor(judge, pictures, factors)


def _two_scenes(one: Subject) -> list[Scene]:
    generator = world.rng("gate", one.seed)
    return [Scene.having({"shape": one.shape}, generator) for _ in range(2)]


def likeness(embeddings: Tensor, cast: list[Subject]) -> tuple[float, float]:
    """Mean cosine of two pictures of one individual, and of two individuals of one class.

    Args:
        embeddings: unit vectors (2N, 64); rows 2k and 2k+1 show ``cast[k]``.
    """
    cosines = embeddings @ embeddings.T
    owner = torch.arange(len(embeddings)) // 2
    kinds = torch.tensor([captions.CLASSES.index(cast[int(at)].shape) for at in owner])
    same = (owner[:, None] == owner) & ~torch.eye(len(owner), dtype=torch.bool)
    other = (kinds[:, None] == kinds) & (owner[:, None] != owner)
    return float(cosines[same].mean()), float(cosines[other].mean())


@torch.no_grad()
def round_trip(vae: AutoencoderKL, pictures: Tensor, batch: int = 64) -> Tensor:
    """Pictures (B, 3, 64, 64) in [0, 1] through the autoencoder (mean of the posterior)."""
    parts = []
    for some in pictures.split(batch):
        latent = vae.encode(some * 2 - 1).latent_dist.mean
        parts.append((vae.decode(latent).sample / 2 + 0.5).clamp(0, 1))
    return torch.cat(parts)


def psnr(vae: AutoencoderKL, count: int = 64) -> float:
    """Peak signal-to-noise ratio of the round trip over unseen scenes, dB."""
    pictures = as_tensor([world.render(Scene.draw(UNSEEN, index))[0] for index in range(count)])
    return float(-10 * (round_trip(vae, pictures) - pictures).square().mean().log10())


LEAST = {"tinyworld": 0.90, "tinyworld-flow": 0.85}
"""Prompt accuracy that each shipped base has to reach; the second has a twelfth of the first's parameters."""


def base_gates(base: Any, judge: Judge, accuracy: Mapping[str, float], least: float) -> list[Gate]:
    """How good a base is: prompt accuracy (from ``base_accuracy``), the renderer's own, and the autoencoder."""
    return [
        Gate("prompt accuracy of the base", accuracy["all"], least),
        Gate("prompt accuracy of the renderer", oracle_accuracy(judge)["all"], 0.99),
        Gate("autoencoder round trip, PSNR in dB", psnr(base.vae), 28.0),
    ]


def base_accuracy(base: Any, judge: Judge, count: int = 200) -> Mapping[str, float]:
    """Prompt accuracy of the base's pictures for unseen captions, for each factor and over all."""
    from finetune.tinyworld.training.export import sample

    some = unseen_captions(count)
    return accuracy_by_factor(judge, sample(base, [text for text, _, _ in some]), [named for _, named, _ in some])


def oracle_accuracy(judge: Judge, count: int = 200) -> Mapping[str, float]:
    """The same for the renderer itself: what a perfect base would score."""
    some = unseen_captions(count)
    pictures = [world.render(scene)[0] for _, _, scene in some]
    return accuracy_by_factor(judge, pictures, [named for _, named, _ in some])
