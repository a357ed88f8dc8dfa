"""Qwen-Image: a Qwen2.5-VL text encoder, a transformer of two streams, an autoencoder made for films (Wu et al. 2025,
https://arxiv.org/abs/2508.02324).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from finetune.batch import Conditioning, Posterior
from finetune.families.flux import packed, unpacked
from finetune.families.language_model import TEXT_ENCODER, LanguageModelFolder, ask
from finetune.families.parts import Part
from finetune.families.patterns import NORMS
from finetune.family import ExportNames, Published, Sites

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""What the pipeline asks; part of the model."""
BEFORE = 34
"""Tokens of the template before the caption; the denoiser is not given them."""

_ATTENTION = [r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"]
_WIDE = [*_ATTENTION, r"transformer_blocks\.\d+\.(img|txt)_mlp\.net\.(0\.proj|2)"]


class QwenImage(LanguageModelFolder):
    """A folder in the layout of ``QwenImagePipeline``.

    Raises:
        UserError: a part is missing, or the scheduler is none that this family trains with.
    """

    name: ClassVar[str] = "qwen-image"
    published = Published("qwen-image")
    models: ClassVar[str] = "Qwen-Image"
    pipelines: ClassVar[Sequence[str]] = ("QwenImagePipeline",)
    parts: ClassVar[Mapping[str, Part]] = {
        "denoiser": Part("transformer", "diffusers.QwenImageTransformer2DModel"),
        "vae": Part("vae", "diffusers.AutoencoderKLQwenImage"),
        TEXT_ENCODER: Part("text_encoder", "transformers.Qwen2_5_VLForConditionalGeneration", tokenizer="tokenizer"),
    }
    length: int = 1024 + BEFORE

    def __init__(self, folder: Path, source: str | None = None) -> None:
        super().__init__(folder, source)
        self.pixel_multiple = self.latent_scale * self.patch
        last = rf"^transformer_blocks\.{self.settings['denoiser']['num_layers'] - 1}\."
        self.sites = Sites(
            linears={
                "attention": {"denoiser": _ATTENTION},
                "context": {"denoiser": [r"transformer_blocks\.\d+\.attn\.(add_[qkv]_proj|to_add_out)"]},
                "wide": {"denoiser": _WIDE},
                "blocks": {"denoiser": [*_WIDE, r"transformer_blocks\.\d+\.(img|txt)_mod\.1"]},
            },
            selections={
                "all": {"denoiser": [""]},
                "attention": {"denoiser": [r"\.attn\."]},
                "context": {"denoiser": [r"\.attn\.(add_|to_add_out|norm_added_)", r"\.txt_(mlp|mod)\."]},
                "norm-bias": {"denoiser": NORMS},
                "blocks": {"denoiser": [r"^transformer_blocks\."]},
            },
            readers=self.readers,
            vocabularies=list(self.vocabularies.values()),
            # the prompt's stream ends in the last block, where it is attended to and asks nothing
            unread={"denoiser": [rf"{last}attn\.(add_q_proj|norm_added_q|to_add_out)\b", rf"{last}txt_mlp\."]},
        )
        self.export_names = {"denoiser": ExportNames("transformer")}

    def latent_size(self, settings: Mapping[str, Any]) -> tuple[int, int]:
        """As the autoencoder for films calls them."""
        return settings["z_dim"], 2 ** len(settings["temperal_downsample"])

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Posterior:
        """Map [B, 3, H, W] in [-1, 1] to a posterior over unscaled latents [B, C, H / scale, W / scale], float32.

        To the autoencoder a picture is a film of one frame.
        """
        film = super().encode_image(pixels.unsqueeze(2))
        return Posterior(mean=film.mean.squeeze(2), logvar=film.logvar.squeeze(2))

    def wrap(self, text: str) -> str:
        """``text`` as a user's, in a conversation about describing pictures."""
        return TEMPLATE.format(text)

    def encode_prompt(self, captions: Sequence[str]) -> Conditioning:
        """The last states, after the final norm, of each caption's own tokens and the template's behind it.

        Captions are read one by one, so that none is padded.
        """
        told = (self.told([caption]) for caption in captions)
        states = (ask(self.networks[TEXT_ENCODER], one)[-1] for one in told)
        return Conditioning.stack([Conditioning(tokens=one[:, BEFORE:]) for one in states])

    def prompt_length(self, caption: str, words: Mapping[str, int] | None = None) -> int:
        """Those of the template behind it included; nothing is padded."""
        return min(self.count(caption, words), self.length) - BEFORE

    def predict(self, noisy: Tensor, timesteps: Tensor, prompt: Conditioning, geometry: Tensor) -> Tensor:
        """The transformer's answer, [B, C, h, w]. It does not look at ``geometry``."""
        height, width = noisy.shape[-2:]
        answer = self.networks["denoiser"](
            hidden_states=packed(noisy),
            timestep=timesteps.to(noisy.dtype) / 1000,
            encoder_hidden_states=prompt.tokens,
            encoder_hidden_states_mask=_real(prompt),
            img_shapes=[[(1, height // 2, width // 2)]] * len(noisy),
            return_dict=False,
        )[0]
        return unpacked(answer, height, width)

    def guided(self, scale: float, prompts: int = 1) -> dict[str, Any]:
        """The pipeline guides away from nothing unless it is told to: from the empty prompt, as captions drop out."""
        return {"true_cfg_scale": scale, "negative_prompt": [""] * prompts if scale > 1 else None}


def _real(prompt: Conditioning) -> Tensor | None:
    """True where a token is a prompt's own, bool [B, T]; None where all are."""
    if prompt.lengths is None:
        return None
    places = torch.arange(prompt.tokens.shape[1], device=prompt.tokens.device)
    return places < torch.tensor(prompt.lengths, device=places.device)[:, None]


def tiny(path: Path, *, seed: int = 0) -> Path:
    """Write a ``QwenImagePipeline`` folder with random weights; see ``finetune.families.tiny``."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    from finetune.families.tiny import drawn
    from finetune.families.tiny_qwen import qwen25vl, tokenizer

    channels = 4
    with drawn(seed):
        QwenImagePipeline(
            vae=AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=channels,
                dim_mult=[1, 1],
                num_res_blocks=1,
                temperal_downsample=[False],
                latents_mean=[-0.8, 0.1, 0.4, -0.2],
                latents_std=[2.8, 1.5, 2.3, 0.7],
            ).eval(),
            text_encoder=qwen25vl(16),
            tokenizer=tokenizer(),
            transformer=QwenImageTransformer2DModel(
                in_channels=4 * channels,
                out_channels=channels,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=1,
                joint_attention_dim=16,
                axes_dims_rope=(4, 6, 6),
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192),
        ).save_pretrained(path)
    return path


FAMILY = QwenImage
