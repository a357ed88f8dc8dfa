"""What the data pipeline promises to a training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """B prompts as a denoiser reads them. Only the family that made it looks inside.

    Attributes:
        tokens: one vector per token, float [B, T, D].
        pooled: one vector per prompt, float [B, P], where the family has one.
        mask: True where a token is real, bool [B, T], where the family masks.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    def to(self, device: torch.device | str) -> Conditioning:
        """The same prompts on ``device``."""
        return self._map(lambda tensor: tensor.to(device))

    def rows(self, index: Tensor) -> Conditioning:
        """The prompts at ``index`` (long or bool [B])."""
        return self._map(lambda tensor: tensor[index])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        changed = {name: change(tensor) for name, tensor in vars(self).items() if tensor is not None}
        return Conditioning(**changed)

    @staticmethod
    def stack(parts: Sequence[Conditioning]) -> Conditioning:
        """Prompts of several batches of equal length, one after the other."""
        names = [name for name, value in vars(parts[0]).items() if value is not None]
        return Conditioning(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


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

    def __len__(self) -> int:
        return len(self.ids)

    def by_size(self, each: Callable[[Batch], Tensor]) -> Tensor:
        """``each`` of the samples of every size together, [B, ...], in this batch's order.

        Args:
            each: maps a batch of one size to one row per sample.
        """
        if self.sizes is None:
            return each(self)
        groups = {size: [i for i, own in enumerate(self.sizes) if own == size] for size in self.sizes}
        rows = torch.cat([each(self._of(size, places)) for size, places in groups.items()])
        order = torch.tensor([place for places in groups.values() for place in places], device=rows.device)
        return rows[order.argsort()]

    def _of(self, size: tuple[int, int], places: Sequence[int]) -> Batch:
        """The samples at ``places``, all of one size."""
        height, width = size
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
