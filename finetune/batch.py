"""What the data pipeline promises to a training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """B prompts as a denoiser reads them. Only the family that made it looks inside.

    Attributes:
        tokens: one vector per token, float [B, T, D].
        pooled: one vector per prompt, float [B, P], where the family has one.
        mask: True where a token is real, bool [B, T], where the family masks.
        lengths: how many of the T tokens are each prompt's, where they differ; the others are zeros that no denoiser
            may see. None where all fill the tensors.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    lengths: tuple[int, ...] | None = None

    def to(self, device: torch.device | str) -> Conditioning:
        """The same prompts on ``device``."""
        return self._map(lambda tensor: tensor.to(device))

    def rows(self, index: Tensor) -> Conditioning:
        """The prompts at ``index`` (long or bool [B]), as long as the longest of them."""
        found = replace(self._map(lambda tensor: tensor[index]), lengths=None)
        return found if self.lengths is None else found._fitted(torch.tensor(self.lengths)[index.cpu()].tolist())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is there, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Conditioning:
        """Prompts of one length from their ``tensors``."""
        return cls(tokens=tensors["tokens"], pooled=tensors.get("pooled"), mask=tensors.get("mask"))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return replace(self.of({name: change(tensor) for name, tensor in self.tensors.items()}), lengths=self.lengths)

    def _fitted(self, lengths: Sequence[int]) -> Conditioning:
        """With as many tokens as the longest of ``lengths``, one for each prompt."""
        longest = max(lengths)
        added = longest - self.tokens.shape[1]
        return replace(
            self,
            tokens=F.pad(self.tokens, (0, 0, 0, added)),
            mask=None if self.mask is None else F.pad(self.mask, (0, added)),
            lengths=tuple(lengths) if min(lengths) < longest else None,
        )

    @staticmethod
    def stack(parts: Sequence[Conditioning]) -> Conditioning:
        """Prompts of several batches, one after the other."""
        lengths = [part.lengths or (part.tokens.shape[1],) * len(part.tokens) for part in parts]
        longest = max(max(own) for own in lengths)
        fitted = [part._fitted([longest]).tensors for part in parts]
        whole = Conditioning.of({name: torch.cat([tensors[name] for tensors in fitted]) for name in fitted[0]})
        return whole._fitted([length for own in lengths for length in own])


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """What an image encoder says of B pictures, unscaled, so that a cache outlives a change of scaling.

    Attributes:
        mean: float [B, C, h, w].
        logvar: float [B, C, h, w]; minus infinity where the encoder has no variance.
    """

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """``mean + std * noise``, with the log-variance clamped as diffusers clamps it."""
        return self.mean + torch.exp(0.5 * self.logvar.clamp(-30.0, 20.0)) * noise

    def to(self, device: torch.device | str) -> Posterior:
        """The same posterior on ``device``."""
        return Posterior(mean=self.mean.to(device), logvar=self.logvar.to(device))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B captioned pictures, encoded, on one device.

    Attributes:
        ids: names that stay the same in every epoch and on every process. Errors quote them.
        draws: which draw of the endless order each sample is. With ``ids`` it names all of a sample's randomness.
        captions: prompts after templates, dropout and shuffling.
        posterior: of the pictures, [B, C, h, w], unscaled; smaller ones than the largest lie at the top left.
        prior: True where the picture shows the class and not the subject, bool [B].
        weight: how much each sample counts, float32 [B].
        timestep_bias: of each sample's time towards noise, float32 [B]; None where all times are drawn alike.
        geometry: original height and width, crop top and left, target height and width, int64 [B, 6].
        mask: how much each place counts, float32 [B, 1, h, w] in [0, 1]; None where nothing is masked.
        prompt: the captions encoded ahead, as they can be while no text encoder trains.
        class_captions: what each sample's class is called, where the prior is the untouched model itself.
        class_prompt: the class captions encoded ahead.
        sizes: height and width of each sample's latents where they differ; None where all fill the tensors.
        agree: the largest of a number that each process brings; set where networks must run equally often on all.
    """

    ids: tuple[str, ...]
    draws: tuple[int, ...]
    captions: tuple[str, ...]
    posterior: Posterior
    prior: Tensor
    weight: Tensor
    geometry: Tensor
    timestep_bias: Tensor | None = None
    mask: Tensor | None = None
    prompt: Conditioning | None = None
    class_captions: tuple[str, ...] | None = None
    class_prompt: Conditioning | None = None
    sizes: tuple[tuple[int, int], ...] | None = None
    agree: Callable[[int], int] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def by_size(self, each: Callable[[Batch], Tensor]) -> Tensor:
        """``each`` of the samples of every size together, [B, ...], in this batch's order.

        Samples are of one size where their latents are, and where their prompts that are encoded have as many tokens.
        Where processes must ``agree``, one that has fewer sizes than another repeats its first, which then counts for
        nothing.

        Args:
            each: maps a batch of one size to one row per sample.
        """
        parts = self._parts()
        # asked before any pass: under ZeRO-3 a pass waits for those of the other processes
        passes = self.agree(len(parts)) if self.agree else len(parts)
        rows = torch.cat([each(part) for _, part in parts])
        for _ in range(passes - len(parts)):
            rows = rows + 0.0 * each(parts[0][1]).sum()  # part of the loss, so that the backward pass is as long too
        order = torch.tensor([place for places, _ in parts for place in places], device=rows.device)
        return rows[order.argsort()]

    def _parts(self) -> list[tuple[Sequence[int], Batch]]:
        """The samples of every size together, with their places in this batch."""
        prompts = [prompt.lengths for prompt in (self.prompt, self.class_prompt) if prompt]
        differing = [sizes for sizes in (self.sizes, *prompts) if sizes is not None]
        if not differing:
            return [(range(len(self)), self)]
        groups: dict[tuple[object, ...], list[int]] = {}
        for place, size in enumerate(zip(*differing, strict=True)):
            groups.setdefault(size, []).append(place)
        return [(places, self._of(places)) for places in groups.values()]

    def _of(self, places: Sequence[int]) -> Batch:
        """The samples at ``places``, all of one size."""
        height, width = self.sizes[places[0]] if self.sizes else self.posterior.mean.shape[-2:]
        index = torch.tensor(places, device=self.prior.device)
        mean, logvar = (part[index, ..., :height, :width] for part in (self.posterior.mean, self.posterior.logvar))
        return Batch(
            ids=tuple(self.ids[i] for i in places),
            draws=tuple(self.draws[i] for i in places),
            captions=tuple(self.captions[i] for i in places),
            posterior=Posterior(mean=mean, logvar=logvar),
            prior=self.prior[index],
            weight=self.weight[index],
            timestep_bias=None if self.timestep_bias is None else self.timestep_bias[index],
            geometry=self.geometry[index],
            mask=None if self.mask is None else self.mask[index, ..., :height, :width],
            prompt=self.prompt and self.prompt.rows(index),
            class_captions=self.class_captions and tuple(self.class_captions[i] for i in places),
            class_prompt=self.class_prompt and self.class_prompt.rows(index),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on ``device``."""
        moved = {name: value.to(device) for name, value in vars(self).items() if hasattr(value, "to")}
        return replace(self, **moved)
