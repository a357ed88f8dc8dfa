"""Stable Diffusion 3 and 3.5: two CLIP text encoders, a T5 that may be absent, a transformer of two streams
(Esser et al. 2024, https://arxiv.org/abs/2403.03206).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.batch import Conditioning
from finetune.families import clip_text, t5, two_streams
from finetune.families.folder import DiffusersFolder
from finetune.families.long_prompts import read_units, split
from finetune.families.parts import Part, read_json
from finetune.families.unet import missing_level
from finetune.family import ExportNames, Published, Sites, Unsupported
from finetune.originals import sd3 as original

CLIPS = ("text_encoder", "text_encoder_2")
T5 = "text_encoder_3"
LENGTH = 256
"""Tokens that the pipeline lets T5 read."""

_UNREAD_BY = ("diffusers", "a1111")  # of kohya's files
_PUBLISHED = {
    (24, False): Published("stable-diffusion-3-m"),
    (24, True): Published("stable-diffusion-3-5-medium"),
    (38, True): Published("stable-diffusion-3-5-large"),
}
"""By attention heads, and whether queries and keys are normalised."""


class SD3(DiffusersFolder):
    """A folder in the layout of ``StableDiffusion3Pipeline``.

    Where ``model_index.json`` names no third text encoder, zeros stand in its place, as in the pipeline.

    Raises:
        UserError: a part is missing, or the scheduler is none that this family trains with.
    """

    name: ClassVar[str] = "sd3"
    models: ClassVar[str] = "Stable Diffusion 3 and 3.5"
    pipelines: ClassVar[Sequence[str]] = ("StableDiffusion3Pipeline",)
    parts: ClassVar[Mapping[str, Part]] = {
        "denoiser": Part("transformer", "diffusers.SD3Transformer2DModel"),
        "vae": Part("vae", "diffusers.AutoencoderKL"),
        "text_encoder": Part("text_encoder", "transformers.CLIPTextModelWithProjection", tokenizer="tokenizer"),
        "text_encoder_2": Part("text_encoder_2", "transformers.CLIPTextModelWithProjection", tokenizer="tokenizer_2"),
        T5: t5.part("text_encoder_3", tokenizer="tokenizer_3"),
    }
    published = Published("stable-diffusion-3-custom")
    readers: ClassVar[tuple[str, str] | Unsupported] = two_streams.READERS
    chunks: ClassVar[Unsupported | None] = Unsupported("its pipeline reads one chunk with each CLIP; T5 reads on")

    def __init__(self, folder: Path, source: str | None = None) -> None:
        if (read_json(folder / "model_index.json").get(T5) or [None])[0] is None:
            self.parts = {name: part for name, part in self.parts.items() if name != T5}  # type: ignore[misc]
        super().__init__(folder, source)
        self.pixel_multiple = self.latent_scale * self.patch
        settings = self.settings["denoiser"]
        last = settings["num_layers"] - 1
        self.sites = Sites(
            linears=two_streams.linears(CLIPS),
            selections=two_streams.selections(CLIPS),
            readers=self.readers,
            vocabularies=list(self.vocabularies.values()),
            # the prompt's stream ends in the last block, where it is attended to and asks nothing
            unread={"denoiser": [rf"^transformer_blocks\.{last}\.attn\.(add_q_proj|norm_added_q)\b"]},
        )
        levels = {name: missing_level(self.parts[name]) for name in CLIPS}
        self.export_names = {
            "denoiser": ExportNames(
                "transformer", "lora_unet", places=original.places(settings), unread_by=_UNREAD_BY, single_file=True
            ),
            "text_encoder": ExportNames("text_encoder", "lora_te1", levels["text_encoder"], "clip_l"),
            "text_encoder_2": ExportNames("text_encoder_2", "lora_te2", levels["text_encoder_2"], "clip_g"),
            **({T5: ExportNames(T5, "lora_te3", words="t5xxl")} if T5 in self.parts else {}),
        }
        self.published = _PUBLISHED.get(
            (settings["num_attention_heads"], bool(settings.get("qk_norm"))), self.published
        )

    def encode_prompt(self, captions: Sequence[str]) -> Conditioning:
        """The CLIPs' states before the last layer, side by side, and behind them T5's; the CLIPs' pooled answers."""
        texts = list(map(self.vocabularies["text_encoder"].expand, captions))
        first, second = (clip_text.penultimate(self.networks[name], self.tokenizers[name], texts) for name in CLIPS)
        assert first.pooled is not None and second.pooled is not None
        clips, further = torch.cat([first.tokens, second.tokens], dim=-1), self._further(texts, first.tokens)
        clips = F.pad(clips, (0, further.shape[-1] - clips.shape[-1]))
        return Conditioning(
            tokens=torch.cat([clips, further], dim=1), pooled=torch.cat([first.pooled, second.pooled], dim=-1)
        )

    def _further(self, texts: Sequence[str], like: Tensor) -> Tensor:
        """What T5 makes of ``texts``, [N, 256, D], or zeros."""
        if T5 in self.parts:
            return t5.states(self.networks[T5], self.tokenizers[T5], texts, LENGTH)
        return like.new_zeros(len(texts), LENGTH, self.settings["denoiser"]["joint_attention_dim"])

    def caption_overflow(self, caption: str, words: Mapping[str, int] | None = None) -> int:
        """How many tokens of ``caption`` no encoder reads: T5 reads on where the CLIPs end."""
        if T5 in self.parts:
            return t5.overflow(self.tokenizers[T5], caption, LENGTH, words)
        return split(self._clip, read_units(self._clip, caption, words), 1).lost

    def prompt_length(self, caption: str, words: Mapping[str, int] | None = None) -> int:
        """The same for all: padding is read."""
        return int(self._clip.model_max_length) + LENGTH

    def predict(self, noisy: Tensor, timesteps: Tensor, prompt: Conditioning, geometry: Tensor) -> Tensor:
        """The transformer's answer, [B, C, h, w]. It does not look at ``geometry``."""
        return self.networks["denoiser"](
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=prompt.tokens,
            pooled_projections=prompt.pooled,
            return_dict=False,
        )[0]

    def pipeline_settings(self) -> dict[str, Any]:
        """What the folder does not hold."""
        return {} if T5 in self.parts else {T5: None, "tokenizer_3": None}

    @property
    def _clip(self) -> Any:
        """The first encoder's tokenizer, which cuts texts as the second's does."""
        return self.tokenizers["text_encoder"]


def tiny(path: Path, *, seed: int = 0) -> Path:
    """Write a ``StableDiffusion3Pipeline`` folder with random weights; see ``finetune.families.tiny``."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    from finetune.families.tiny import WIDTH, clip_text, drawn, unquantised
    from finetune.tinyworld.tokenizer import build

    wider, wide = 24, 48  # the second CLIP, which diffusers tells from the first by it, and T5: more than both
    with drawn(seed):
        first = clip_text(CLIPTextModelWithProjection, projection_dim=WIDTH, eos_token_id=2)
        torch.nn.init.eye_(first.text_projection.weight)  # as published
        StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=8,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=wide,
                caption_projection_dim=16,
                pooled_projection_dim=WIDTH + 8,
                pos_embed_max_size=16,
                dual_attention_layers=(0,),  # as in 3.5 Medium
                qk_norm="rms_norm",
            ).eval(),
            vae=unquantised(1.5305, 0.0609),
            text_encoder=first,
            text_encoder_2=clip_text(CLIPTextModelWithProjection, hidden_size=wider, projection_dim=8, eos_token_id=2),
            text_encoder_3=t5.tiny_encoder(wide),
            tokenizer=build(),
            tokenizer_2=build(),
            tokenizer_3=t5.tiny_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        ).save_pretrained(path)
    return path


FAMILY = SD3
