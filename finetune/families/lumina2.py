"""Lumina-Image 2.0: a Gemma 2 text encoder, a transformer of one stream (Qin et al. 2025,
https://arxiv.org/abs/2503.21758).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from finetune.batch import Conditioning
from finetune.families import one_stream
from finetune.families.language_model import TEXT_ENCODER, LanguageModelFolder, ask
from finetune.families.parts import Part
from finetune.family import ExportNames, Published, Sites

INSTRUCTION = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start> "
)
"""What the pipeline says before a prompt; part of the model."""


class Lumina2(LanguageModelFolder):
    """A folder in the layout of ``Lumina2Pipeline``.

    Raises:
        UserError: a part is missing, or the scheduler is none that this family trains with.
    """

    name: ClassVar[str] = "lumina2"
    published = Published("lumina-2")
    models: ClassVar[str] = "Lumina-Image 2.0"
    pipelines: ClassVar[Sequence[str]] = ("Lumina2Pipeline",)
    parts: ClassVar[Mapping[str, Part]] = {
        "denoiser": Part("transformer", "diffusers.Lumina2Transformer2DModel"),
        "vae": Part("vae", "diffusers.AutoencoderKL"),
        TEXT_ENCODER: Part("text_encoder", "transformers.Gemma2Model", tokenizer="tokenizer"),
    }
    length: int = 256

    def __init__(self, folder: Path, source: str | None = None) -> None:
        super().__init__(folder, source)
        self.pixel_multiple = self.latent_scale * self.patch
        self.sites = Sites(
            linears=one_stream.linears(
                "attn", r"feed_forward\.linear_[123]", r"(noise_refiner|layers)\.\d+\.norm1\.linear"
            ),
            selections=one_stream.selections("attn"),
            readers=self.readers,
            vocabularies=list(self.vocabularies.values()),
        )
        self.export_names = {"denoiser": ExportNames("transformer")}

    def wrap(self, text: str) -> str:
        """``text`` behind the instruction; where there is none, nothing, as the pipeline guides away from it."""
        tokenizer = self.tokenizers[TEXT_ENCODER]
        start: str = tokenizer.decode(tokenizer("").input_ids)  # with which it begins every text
        return f"{start}{INSTRUCTION}{text}" if text else start

    def encode_prompt(self, captions: Sequence[str]) -> Conditioning:
        """The states before the last layer, 256 tokens long; the denoiser is told which are real."""
        told = self.told(captions, padding="max_length", padding_side="right")
        states = ask(self.networks[TEXT_ENCODER], told)[-2]
        return Conditioning(
            tokens=states, mask=torch.tensor(told["attention_mask"], dtype=torch.bool).to(states.device)
        )

    def prompt_length(self, caption: str, words: Mapping[str, int] | None = None) -> int:
        """The same for all: padding is masked."""
        return self.length

    def predict(self, noisy: Tensor, timesteps: Tensor, prompt: Conditioning, geometry: Tensor) -> Tensor:
        """The transformer's answer, [B, C, h, w]. It does not look at ``geometry``.

        The transformer counts time from noise, 0, to picture, 1, and answers with ``x0 - eps``.
        """
        answer = self.networks["denoiser"](
            hidden_states=noisy,
            timestep=1 - timesteps / 1000,
            encoder_hidden_states=prompt.tokens,
            encoder_attention_mask=_real(prompt),
            return_dict=False,
        )[0]
        return -answer


def _real(prompt: Conditioning) -> Tensor:
    """1 where a token is a prompt's own, int64 [B, T]. A plan's tokens have no values to be asked: all are."""
    mask = prompt.mask
    if mask is None or mask.is_meta:
        return torch.ones(prompt.tokens.shape[:2], dtype=torch.long, device="cpu")
    return mask.long()


def tiny(path: Path, *, seed: int = 0) -> Path:
    """Write a ``Lumina2Pipeline`` folder with random weights; see ``finetune.families.tiny``."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    from finetune.families.tiny import drawn, unquantised
    from finetune.families.tiny_gemma import gemma2, tokenizer

    width, head = 16, (2, 4, 4)
    words = tokenizer()
    with drawn(seed):
        Lumina2Pipeline(
            transformer=Lumina2Transformer2DModel(
                sample_size=8,
                in_channels=4,
                hidden_size=2 * sum(head),
                num_layers=2,
                num_refiner_layers=1,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=8,
                axes_dim_rope=head,
                axes_lens=(300, 32, 32),  # the first counts tokens of a prompt
                cap_feat_dim=width,
            ).eval(),
            vae=unquantised(0.3611, 0.1159),
            text_encoder=gemma2(width, len(words)),
            tokenizer=words,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        ).save_pretrained(path)
    return path


FAMILY = Lumina2
