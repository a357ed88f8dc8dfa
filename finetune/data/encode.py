"""Pictures and captions to what a denoiser reads, through the content-keyed store."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch

from finetune.batch import Conditioning, Posterior
from finetune.config.schema import DataConfig
from finetune.data import images
from finetune.data.cache import Counts, Store, key
from finetune.data.framing import Crop
from finetune.data.packs import Tensors
from finetune.data.processes import Processes
from finetune.data.sources import Picture
from finetune.errors import GuardError
from finetune.family import ModelFamily

LATENTS, PROMPTS = "latents", "prompts"  # folders in the cache


class Latents:
    """Posteriors of pictures. The image encoder is loaded when the first one has to be made.

    Args:
        family: encodes.
        data: whether and where posteriors are kept.
    """

    def __init__(self, family: ModelFamily, data: DataConfig) -> None:
        self.family = family
        self.store = Store(Path(data.cache.folder) / LATENTS if data.cache.latents else None)
        self.dtype: torch.dtype = getattr(torch, data.cache.dtype)
        self._encoder = family.fingerprint("vae")

    @property
    def counts(self) -> Counts:
        """What was read and what was made."""
        return self.store.counts

    def get(self, picture: Picture, crop: Crop, flipped: bool = False) -> Posterior:
        """The posterior of what is cut from a picture, mirrored or not; [1, C, h, w], float32."""
        made = self.store.get(self.key(picture, crop, flipped), lambda: self._encode(picture, crop, flipped))
        return Posterior(**{label: tensor.float() for label, tensor in made.items()})

    def fill(self, cuts: Iterable[tuple[Picture, Crop, bool]], processes: Processes) -> None:
        """Keep the posteriors of ``cuts``, as arguments of ``get``; processes share the work."""
        wanted = {self.key(*cut): partial(self._encode, *cut) for cut in cuts}
        self.store.fill(wanted, processes, "Encoding pictures")

    def key(self, picture: Picture, crop: Crop, flipped: bool = False) -> str:
        """The name of a picture's entry in the store."""
        return key(
            "posterior",
            family=self.family.name,
            encoder=self._encoder,
            picture=picture.facts.sha256,
            crop=list(crop[:4]),
            target=list(crop.target),
            flipped=flipped,
            dtype=str(self.dtype),
            preprocessing=images.VERSION,
        )

    @torch.no_grad()
    def _encode(self, picture: Picture, crop: Crop, flipped: bool) -> Tensors:
        self.family.require("vae")
        pixels = images.pixels(picture, crop)[None]
        posterior = self.family.encode_image(pixels.flip(-1) if flipped else pixels)
        mean, logvar = (part.to("cpu", self.dtype) for part in (posterior.mean, posterior.logvar))
        if not mean.isfinite().all() or logvar.isnan().any():
            raise GuardError(f"{picture.path}: the image encoder gives numbers that are not finite for this picture")
        return {"mean": mean, "logvar": logvar}


class Prompts:
    """Encoded captions, per final string. The text encoders are loaded when the first one has to be made.

    Only while no text encoder trains.
    """

    def __init__(self, family: ModelFamily, data: DataConfig) -> None:
        self.family = family
        self.store = Store(Path(data.cache.folder) / PROMPTS if data.cache.text else None)
        self._encoder = family.fingerprint(*family.text_encoders)

    @property
    def counts(self) -> Counts:
        """What was read and what was made."""
        return self.store.counts

    def get(self, caption: str) -> Conditioning:
        """One caption as the denoiser reads it."""
        return Conditioning.of(self.store.get(self.key(caption), lambda: self._encode(caption)))

    def fill(self, captions: Iterable[str], processes: Processes) -> None:
        """Keep ``captions``, encoded; processes share the work."""
        wanted = {self.key(caption): partial(self._encode, caption) for caption in captions}
        self.store.fill(wanted, processes, "Encoding captions")

    def key(self, caption: str) -> str:
        """The name of a caption's entry in the store."""
        return key(
            "prompt",
            family=self.family.name,
            encoder=self._encoder,
            chunks=self.family.prompt_chunks,
            length=self.family.prompt_length(caption),  # models may share encoders, and let them read on to other ends
            caption=caption,
        )

    def stack(self, captions: Iterable[str]) -> Conditioning:
        """Several captions, each encoded alone."""
        return Conditioning.stack([self.get(caption) for caption in captions])

    @torch.no_grad()
    def _encode(self, caption: str) -> Tensors:
        self.family.require(*self.family.text_encoders)
        encoded = self.family.encode_prompt([caption])
        return {label: tensor.cpu() for label, tensor in encoded.tensors.items()}
