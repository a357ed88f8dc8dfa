"""What the models of FLUX.2 have in common: a language model read at three depths, an autoencoder whose latents are
normed by tokens, a transformer that begins with two streams and goes on with one, a shift of times of their own (Black
Forest Labs 2025, https://bfl.ai/blog/flux-2; no paper).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from finetune.batch import Conditioning
from finetune.families.flux import packed, unpacked
from finetune.families.language_model import TEXT_ENCODER, LanguageModelFolder, ask
from finetune.families.parts import Part
from finetune.families.patterns import NORMS
from finetune.family import ExportNames, Sites
from finetune.objectives import Denoising, Flow
from finetune.objectives.shifts import Size, static

STEPS = 50
"""Of a picture, by default; the pipelines' shift of times depends on them."""

_ATTENTION = [
    r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
    r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)",
]
_WIDE = [*_ATTENTION, r"transformer_blocks\.\d+\.ff(_context)?\.linear_(in|out)"]


class Flux2Folder(LanguageModelFolder):
    """A model of FLUX.2. A family says which language model it has, how that is asked and how deep it is read.

    Raises:
        UserError: a part is missing, or the scheduler is none that these families train with.
    """

    depths: ClassVar[Sequence[int]]
    """Layers of the language model behind which the pipeline reads its states."""
    length: int = 512

    def __init__(self, folder: Path, source: str | None = None) -> None:
        super().__init__(folder, source)
        if isinstance(self.process, Flow):  # the pipelines shift by a rule of their own, whatever the scheduler says
            self.process = replace(self.process, shift=shifted)
            self.objective = Denoising(self.process)
        self.pixel_multiple = self.latent_scale * self.patch
        self.sites = Sites(
            linears={
                "attention": {"denoiser": _ATTENTION},
                "context": {"denoiser": [r"transformer_blocks\.\d+\.attn\.(add_[qkv]_proj|to_add_out)"]},
                "wide": {"denoiser": _WIDE},
            },
            selections={
                "all": {"denoiser": [""]},
                "attention": {"denoiser": [r"\.attn\."]},
                "context": {"denoiser": [r"\.attn\.(add_|to_add_out|norm_added_)", r"\.ff_context\."]},
                "norm-bias": {"denoiser": NORMS[:1]},  # there are no biases
                "blocks": {"denoiser": [r"^(single_)?transformer_blocks\."]},
            },
            readers=self.readers,
            vocabularies=list(self.vocabularies.values()),
        )
        self.export_names = {"denoiser": ExportNames("transformer")}

    def scale(self, latents: Tensor) -> Tensor:
        """Each of a token's numbers as the autoencoder's batch norm leaves it, outside of its training."""
        mean, std = (values.to(latents) for values in self._norm)
        return unpacked((packed(latents) - mean) / std, *latents.shape[-2:])

    @functools.cached_property
    def _norm(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of a token's numbers, [4 C], kept when the autoencoder is freed; of its true weights."""
        true = "vae" in self.networks and self.networks["vae"].dtype == torch.float32
        vae: Any = self.networks["vae"] if true else self.fresh("vae")
        mean, variance = vae.bn.running_mean.cpu().clone(), vae.bn.running_var.cpu()
        return mean, torch.sqrt(variance + vae.config.batch_norm_eps)

    def encode_prompt(self, captions: Sequence[str]) -> Conditioning:
        """The states at three depths side by side, 512 tokens long: the denoiser reads padding like any token."""
        states = ask(self.networks[TEXT_ENCODER], self.told(captions, padding="max_length"))
        return Conditioning(tokens=torch.cat([states[depth] for depth in self.depths], dim=-1))

    def prompt_length(self, caption: str, words: Mapping[str, int] | None = None) -> int:
        """The same for all: padding is read."""
        return self.length

    def predict(self, noisy: Tensor, timesteps: Tensor, prompt: Conditioning, geometry: Tensor) -> Tensor:
        """The transformer's answer, [B, C, h, w]. It does not look at ``geometry``."""
        count, _, height, width = noisy.shape
        guidance = None if self.guidance is None else timesteps.new_full((count,), self.guidance, dtype=torch.float)
        answer = self.networks["denoiser"](
            hidden_states=packed(noisy),
            timestep=timesteps.to(noisy.dtype) / 1000,
            guidance=guidance,
            encoder_hidden_states=prompt.tokens,
            txt_ids=places(1, 1, prompt.tokens.shape[1]).to(noisy.device).expand(count, -1, -1),
            img_ids=places(height // 2, width // 2, 1).to(noisy.device).expand(count, -1, -1),
            return_dict=False,
        )[0]
        return unpacked(answer, height, width)


def parts(language_model: str) -> Mapping[str, Part]:
    """Of a family whose text encoder is of this class of transformers."""
    return {
        "denoiser": Part("transformer", "diffusers.Flux2Transformer2DModel"),
        "vae": Part("vae", "diffusers.AutoencoderKLFlux2"),
        TEXT_ENCODER: Part("text_encoder", f"transformers.{language_model}", tokenizer="tokenizer"),
    }


def places(rows: int, columns: int, words: int) -> Tensor:
    """Position of each token, int64 [rows · columns · words, 4]: 0, row, column, word."""
    axes = (torch.arange(size) for size in (1, rows, columns, words))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 3)


def shifted(sigma: Tensor, size: Size) -> Tensor:
    """Times as the pipelines shift those of ``STEPS`` steps: a line in the number of tokens, fitted by their makers."""
    tokens = (size[0] // 2) * (size[1] // 2)
    many = 0.00016927 * tokens + 0.45666666  # for 200 steps, and for any of a large picture
    few = 8.73809524e-05 * tokens + 1.89833333  # for 10
    mu = many if tokens > 4300 else many + (many - few) / 190 * (STEPS - 200)
    return static(sigma, size, math.exp(mu))


def tiny_parts(width: int, guidance_embeds: bool) -> dict[str, Any]:
    """What twins' pipelines have beside a language model ``width`` wide; weights as torch draws them."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    channels = 4
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 4)
    transformer = Flux2Transformer2DModel(
        in_channels=4 * channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=3 * width,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return {"vae": vae, "transformer": transformer, "scheduler": scheduler}
