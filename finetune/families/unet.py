"""What families with diffusers' cross-attention U-Net and CLIP text encoders have in common."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from transformers import CLIPTextConfig

from finetune.batch import Conditioning
from finetune.errors import UserError
from finetune.families import long_prompts, patterns
from finetune.families.folder import DiffusersFolder
from finetune.families.lengths import Lengths
from finetune.families.parts import Part
from finetune.family import Unsupported, Vocabulary

READERS = ("attn2.to_k", "attn2.to_v")
"""Layers that read the prompt."""

_ATTENTION = [r".*\.attn[12]\.to_(q|k|v|out\.0)"]
_WIDE = [*_ATTENTION, r".*\.attentions\.\d+\.proj_(in|out)", r".*\.ff\.net\.(0\.proj|2)"]
_CONV = [*_WIDE, r".*\.resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)", r".*\.(down|up)samplers\.0\.conv"]


def linears(text_encoders: Sequence[str]) -> patterns.Patterns:
    """``Sites.linears`` of a U-Net with these text encoders."""
    unet = {
        "attention": _ATTENTION,
        "cross-attention": [r".*\.attn2\.to_(q|k|v|out\.0)"],
        "cross-kv": [r".*\.attn2\.to_[kv]"],
        "wide": _WIDE,
        "conv": _CONV,
    }
    return patterns.linears(unet, text_encoders, wide=("wide", "conv"))


def selections(text_encoders: Sequence[str]) -> patterns.Patterns:
    """``Sites.selections`` of a U-Net with these text encoders."""
    unet = {
        "all": [""],
        "attention": [r"\.attn[12]\."],
        "cross-attention": [r"\.attn2\."],
        "cross-kv": [r"\.attn2\.to_[kv]\."],
        "norm-bias": patterns.NORMS,
        "down": [r"^down_blocks\."],
        "mid": [r"^mid_block\."],
        "up": [r"^up_blocks\."],
    }
    return patterns.selections(unet, text_encoders)


class UNetFolder(DiffusersFolder):
    """A model with a cross-attention U-Net and CLIP text encoders, which all read the same tokens.

    Raises:
        UserError: the U-Net reads more than latents.
    """

    readers: ClassVar[tuple[str, str] | Unsupported] = READERS
    chunks: ClassVar[Unsupported | None] = None
    unguided_is_zero: bool = False
    """Whether zeros stand in place of a prompt that guides away, where there is none."""

    def __init__(self, folder: Path, source: str | None = None) -> None:
        super().__init__(folder, source)
        network = self.settings["denoiser"]
        if network.get("in_channels", 4) != self.latent_channels:
            raise UserError(f"{folder}: the U-Net does not read plain latents; inpainting models cannot be trained")
        self._lengths = Lengths(self._vocabulary.tokenizer)
        self.pixel_multiple = self.latent_scale * 2 ** (len(network["block_out_channels"]) - 1)

    @abstractmethod
    def read(self, texts: Sequence[str]) -> Conditioning:
        """``texts``, in which new words are written out, as the denoiser reads them."""

    def encode_prompt(self, captions: Sequence[str]) -> Conditioning:
        """What the pipeline's own ``encode_prompt`` gives; chunks of long captions one behind the other."""
        return self.read(list(map(self._vocabulary.expand, captions)))

    def caption_overflow(self, caption: str, words: Mapping[str, int] | None = None) -> int:
        """How many tokens of ``caption`` are cut off, where ``words`` are as many tokens as they say."""
        if self.prompt_chunks == 1 and not words:  # a million captions are counted, not cut
            return max(0, self._lengths(caption) + 2 - int(self._vocabulary.tokenizer.model_max_length))
        return self._split(caption, words).lost

    def prompt_length(self, caption: str, words: Mapping[str, int] | None = None) -> int:
        """A whole number of chunks, padding included."""
        chunks = 1 if self.prompt_chunks == 1 else len(self._split(caption, words).chunks)
        return chunks * int(self._vocabulary.tokenizer.model_max_length)

    def pipeline(self) -> Any:
        """An ordinary pipeline around the networks in memory, which reads long prompts as training does."""
        pipeline = super().pipeline()
        if self.prompt_chunks > 1:
            long_prompts.attach(pipeline, self.read, self.unguided_is_zero)
        return pipeline

    def _split(self, text: str, words: Mapping[str, int] | None = None) -> long_prompts.Split:
        tokenizer = self._vocabulary.tokenizer
        return long_prompts.split(tokenizer, long_prompts.read_units(tokenizer, text, words), self.prompt_chunks)

    @property
    def _vocabulary(self) -> Vocabulary:
        """The first encoder's, which cuts texts as the others do."""
        return self.vocabularies[self.text_encoders[0]]


@functools.cache
def missing_level(part: Part) -> str:
    """The level that the installed transformers leaves out of a CLIP text encoder's names: "text_model." or nothing."""
    kind = getattr(transformers, part.kind.split(".")[1])
    with torch.device("meta"):
        config = CLIPTextConfig(hidden_size=4, intermediate_size=4, num_hidden_layers=0, num_attention_heads=1)
        return "" if hasattr(kind(config), "text_model") else "text_model."
