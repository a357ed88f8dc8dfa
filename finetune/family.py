"""The border between a published architecture and everything else in this toolkit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from finetune.batch import Conditioning, Posterior
from finetune.objective import Objective

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Unsupported:
    """Stands where a site would be, and says why there is none."""

    reason: str


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and the network whose embedding table it indexes."""

    tokenizer: Any
    network: str


@dataclass(frozen=True)
class Sites:
    """Where methods may attach: names of modules and parameters inside ``ModelFamily.networks``.

    Attributes:
        linears: preset -> network -> regular expressions that must match a whole module path; for low-rank adapters.
        selections: preset -> network -> regular expressions searched in a parameter's name; for partial fine-tuning.
        readers: endings of the denoiser's key and value layers that read the prompt; for hypernetworks.
        vocabularies: tokenizers and their embedding tables; for textual inversion.
    """

    linears: Mapping[str, Mapping[str, Sequence[str]]]
    selections: Mapping[str, Mapping[str, Sequence[str]]]
    readers: tuple[str, str] | Unsupported
    vocabularies: Sequence[Vocabulary]


@dataclass(frozen=True)
class ExportNames:
    """What a network of a family is called in adapter files.

    Attributes:
        diffusers: component in diffusers' LoRA files ("unet", "text_encoder").
        kohya: prefix in kohya's files ("lora_unet", "lora_te").
        missing_level: a level that other tools expect in front of every path and that the installed transformers has
            dropped ("text_model."), or "".
    """

    diffusers: str
    kohya: str
    missing_level: str = ""


class ModelFamily(Protocol):
    """One published architecture: how its parts are loaded, fed, asked and named.

    Parts are loaded by ``require`` and freed by ``release`` so that not all of them need be in memory at once. Every
    network is frozen and in ``eval()`` when loaded; a method unfreezes or adds what it trains, always inside
    ``networks``.
    """

    name: ClassVar[str]
    networks: nn.ModuleDict  # what is in memory: "denoiser", "vae", "text_encoder", ...
    objective: Objective
    sites: Sites
    export_names: Mapping[str, ExportNames]  # network -> names
    text_encoders: Sequence[str]  # names of the networks that read prompts
    pixel_multiple: int  # image sides must divide by this
    latent_scale: int  # pixels per latent cell along a side
    source: str  # what a recipe's model.path calls the model
    folder: Path  # where its files are on this machine; diffusers pipelines load from it
    device: torch.device  # where required networks are put; the CPU unless it is set

    def require(self, *networks: str) -> None:
        """Load the named networks where they are not in memory."""
        ...

    def release(self, *networks: str) -> None:
        """Free the named networks. They can be required again."""
        ...

    def fresh(self, network: str) -> nn.Module:
        """Another copy of a network as it is on disk: on the CPU, frozen, in ``eval()``, not in ``networks``."""
        ...

    def fingerprint(self, *networks: str) -> str:
        """Hex digest of the named networks' weights and settings as on disk; changes when any of them does."""
        ...

    def encode_image(self, pixels: Tensor) -> Posterior:
        """Map [B, 3, H, W] in [-1, 1] to a posterior over unscaled latents. No gradient."""
        ...

    def scale(self, latents: Tensor) -> Tensor:
        """Unscaled latents [B, C, h, w] as the denoiser expects them."""
        ...

    def encode_prompt(self, captions: Sequence[str]) -> Conditioning:
        """Tokenize and encode; gradients flow where a text encoder trains. Over-long captions are cut."""
        ...

    def caption_overflow(self, caption: str) -> int:
        """How many tokens of ``caption`` ``encode_prompt`` would cut off; needs the tokenizer alone."""
        ...

    def predict(self, noisy: Tensor, timesteps: Tensor, prompt: Conditioning, geometry: Tensor) -> Tensor:
        """Answer the objective's question for [B, C, h, w]; same shape out. ``geometry`` as in ``Batch``."""
        ...

    def enable_gradient_checkpointing(self) -> None:
        """Trade time for memory in the networks in memory that can train; it acts in ``train()`` mode only."""
        ...

    def pipeline(self) -> DiffusionPipeline:
        """A pipeline around the networks in memory (all are required first), for sampling; shares their weights."""
        ...
