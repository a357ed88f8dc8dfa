"""Pictures and captions to what a denoiser reads, through the content-keyed store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from finetune.batch import Conditioning, Posterior
from finetune.config.schema import DataConfig
from finetune.data import images
from finetune.data.cache import Counts, Store, Tensors, key
from finetune.data.framing import Crop
from finetune.data.processes import Processes
from finetune.data.sources import Picture
from finetune.errors import GuardError
from finetune.family import ModelFamily


class Latents:
    """Posteriors of pictures. The image encoder is loaded when the first one has to be made.

    Args:
        family: encodes.
        data: whether and where posteriors are kept.
    """

    def __init__(self, family: ModelFamily, data: DataConfig) -> None:
        self.family = family
        self.store = Store(Path(data.cache.folder) / "latents" if data.cache.latents else None)
        self._encoder = family.fingerprint("vae")

    @property
    def counts(self) -> Counts:
        """What was read and what was made."""
        return self.store.counts

    def get(self, picture: Picture, crop: Crop, flipped: bool = False) -> Posterior:
        """The posterior of what is cut from a picture, mirrored or not; [1, C, h, w]."""
        made = self.store.get(self.key(picture, crop, flipped), lambda: self._encode(picture, crop, flipped))
        return Posterior(**made)

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
            preprocessing=images.VERSION,
        )

    @torch.no_grad()
    def _encode(self, picture: Picture, crop: Crop, flipped: bool) -> Tensors:
        self.family.require("vae")
        pixels = images.pixels(picture, crop)[None]
        posterior = self.family.encode_image(pixels.flip(-1) if flipped else pixels)
        if not posterior.mean.isfinite().all() or posterior.logvar.isnan().any():
            raise GuardError(f"{picture.path}: the image encoder gives numbers that are not finite for this picture")
        return {"mean": posterior.mean.float().cpu(), "logvar": posterior.logvar.float().cpu()}


class Prompts:
    """Encoded captions, per final string. The text encoders are loaded when the first one has to be made.

    Only while no text encoder trains.
    """

    def __init__(self, family: ModelFamily, data: DataConfig) -> None:
        self.family = family
        self.store = Store(Path(data.cache.folder) / "prompts" if data.cache.text else None)
        self._encoder = family.fingerprint(*family.text_encoders)

    @property
    def counts(self) -> Counts:
        """What was read and what was made."""
        return self.store.counts

    def get(self, caption: str) -> Conditioning:
        """One caption as the denoiser reads it."""
        return Conditioning.of(self.store.get(self.key(caption), lambda: self._encode(caption)))

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


def shared(items: Sequence[Callable[[], object]], processes: Processes) -> None:
    """Encode ``items`` (calls that fill a store), each process its share; then have each process read all of them."""
    for encode in items[processes.rank :: processes.world]:
        encode()
    processes.barrier()
    for encode in items:
        encode()
