"""FLUX.1: a CLIP for the prompt as a whole, a T5 for its tokens, a transformer that begins with two streams and goes on
with one (Black Forest Labs 2024, https://github.com/black-forest-labs/flux; no paper).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from finetune.batch import Conditioning
from finetune.families import clip_text, t5, two_streams
from finetune.families.folder import DiffusersFolder
from finetune.families.parts import Part
from finetune.families.unet import missing_level
from finetune.family import ExportNames, Published, Sites, Unsupported
from finetune.originals import flux as original

CLIP, T5 = "text_encoder", "text_encoder_2"
_CODE = "https://github.com/black-forest-labs/flux"
_WIDTH = 3072  # of the published model


class Flux(DiffusersFolder):
    """A folder in the layout of ``FluxPipeline``: dev, schnell and what is derived from them.

    Dev is guidance-distilled: its denoiser is told a scale of guidance. Schnell is told none, and reads prompts of half
    the length.

    Attributes:
        guidance: what the denoiser is told while it trains; None of schnell.
        length: tokens that T5 reads.

    Raises:
        UserError: a part is missing, or the scheduler is none that this family trains with.
    """

    name: ClassVar[str] = "flux"
    models: ClassVar[str] = "FLUX.1 dev and schnell"
    pipelines: ClassVar[Sequence[str]] = ("FluxPipeline",)
    parts: ClassVar[Mapping[str, Part]] = {
        "denoiser": Part("transformer", "diffusers.FluxTransformer2DModel"),
        "vae": Part("vae", "diffusers.AutoencoderKL"),
        CLIP: Part("text_encoder", "transformers.CLIPTextModel", tokenizer="tokenizer"),
        T5: t5.part("text_encoder_2", tokenizer="tokenizer_2"),
    }
    published = Published("flux-1-custom", code=_CODE)
    readers: ClassVar[tuple[str, str] | Unsupported] = two_streams.READERS
    chunks: ClassVar[Unsupported | None] = Unsupported("T5 reads its tokens, in one piece")

    def __init__(self, folder: Path, source: str | None = None) -> None:
        super().__init__(folder, source)
        guided = bool(self.settings["denoiser"].get("guidance_embeds"))
        self.guidance = 1.0 if guided else None
        self.length = 512 if guided else 256
        self.pixel_multiple = self.latent_scale * self.patch
        self.sites = Sites(
            linears=two_streams.linears((CLIP,), r"single_transformer_blocks\.\d+\.proj_(mlp|out)"),
            selections=two_streams.selections((CLIP,)),
            readers=self.readers,
            vocabularies=list(self.vocabularies.values()),
        )
        settings = self.settings["denoiser"]
        whole = settings["num_attention_heads"] * settings["attention_head_dim"] == _WIDTH
        unread = ("a1111",) if whole else ("a1111", "diffusers")  # whose converter knows that width alone
        self.export_names = {
            "denoiser": ExportNames(
                "transformer", "lora_unet", places=original.places(settings), unread_by=unread, single_file=True
            ),
            CLIP: ExportNames(CLIP, "lora_te1", missing_level(self.parts[CLIP]), "clip_l"),
            T5: ExportNames(T5, "lora_te3", words="t5xxl"),
        }
        if whole:
            self.published = Published("flux-1-dev" if self.guidance else "flux-1-schnell", "flux1", "Flux", _CODE)

    def encode_prompt(self, captions: Sequence[str]) -> Conditioning:
        """T5's last hidden states, and CLIP's pooled answer."""
        texts = list(map(self.vocabularies[CLIP].expand, captions))
        return Conditioning(
            tokens=t5.states(self.networks[T5], self.tokenizers[T5], texts, self.length),
            pooled=clip_text.pooled(self.networks[CLIP], self.tokenizers[CLIP], texts),
        )

    def caption_overflow(self, caption: str, words: Mapping[str, int] | None = None) -> int:
        """How many tokens of ``caption`` T5 does not read. CLIP says something of the first 77 alone."""
        return t5.overflow(self.tokenizers[T5], caption, self.length, words)

    def prompt_length(self, caption: str, words: Mapping[str, int] | None = None) -> int:
        """The same for all: padding is read."""
        return self.length

    def predict(self, noisy: Tensor, timesteps: Tensor, prompt: Conditioning, geometry: Tensor) -> Tensor:
        """The transformer's answer, [B, C, h, w]. It does not look at ``geometry``."""
        height, width = noisy.shape[2:]
        guidance = (
            None if self.guidance is None else timesteps.new_full((len(noisy),), self.guidance, dtype=torch.float)
        )
        answer = self.networks["denoiser"](
            hidden_states=packed(noisy),
            timestep=timesteps / self.time_unit,
            guidance=guidance,
            pooled_projections=prompt.pooled,
            encoder_hidden_states=prompt.tokens,
            txt_ids=noisy.new_zeros(prompt.tokens.shape[1], 3),
            img_ids=places(height // self.patch, width // self.patch).to(noisy.device),
            return_dict=False,
        )[0]
        return unpacked(answer, height, width)

    def pipeline(self) -> Any:
        """An ordinary pipeline around the networks in memory, whose prompts are as long as training's."""
        pipeline = super().pipeline()
        plain = pipeline.encode_prompt

        @functools.wraps(plain)
        def encode_prompt(*arguments: Any, **named: Any) -> Any:
            return plain(*arguments, **{**named, "max_sequence_length": self.length})

        pipeline.encode_prompt = encode_prompt
        return pipeline


def packed(latents: Tensor) -> Tensor:
    """[B, C, h, w] as tokens of 2 x 2 cells, [B, h/2 * w/2, 4 C], row by row."""
    batch, channels, height, width = latents.shape
    cells = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), 4 * channels)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """What ``packed`` made of latents [B, C, ``height``, ``width``] as these again."""
    batch, _, numbers = tokens.shape
    cells = tokens.view(batch, height // 2, width // 2, numbers // 4, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, numbers // 4, height, width)


def places(rows: int, columns: int) -> Tensor:
    """Position of each image token, [rows * columns, 3]: 0, row, column. Those of a prompt's tokens are all 0."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1).float()


def tiny(path: Path, *, seed: int = 0, guidance_embeds: bool = True) -> Path:
    """Write a ``FluxPipeline`` folder with random weights; see ``finetune.families.tiny``.

    Args:
        guidance_embeds: as of dev; False as of schnell, whose times are not shifted either.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    from finetune.families.tiny import WIDTH, clip_text, drawn, unquantised
    from finetune.tinyworld.tokenizer import build

    with drawn(seed):
        FluxPipeline(
            transformer=FluxTransformer2DModel(
                in_channels=4 * 4,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                pooled_projection_dim=WIDTH,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(2, 2, 4),
            ).eval(),
            vae=unquantised(0.3611, 0.1159),
            text_encoder=clip_text(eos_token_id=2),
            text_encoder_2=t5.tiny_encoder(WIDTH),
            tokenizer=build(),
            tokenizer_2=t5.tiny_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds
            ),
        ).save_pretrained(path)
    return path


FAMILY = Flux
