"""Stable Diffusion XL: two CLIP text encoders and a U-Net that is told each picture's size and crop (Podell et al.
2023, https://arxiv.org/abs/2307.01952).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from finetune.batch import Conditioning
from finetune.errors import UserError
from finetune.families import clip_text, unet
from finetune.families.parts import Part, read_json
from finetune.families.unet import UNetFolder
from finetune.family import ExportNames, Published, Sites, Unsupported
from finetune.originals import unet as original

_WIDTH = 2048  # of the token vectors of the published model
_UNSHARED = Unsupported("it reads states from within its CLIPs, and not what they compare with pictures")


class SDXL(UNetFolder):
    """A folder in the layout of ``StableDiffusionXLPipeline``.

    Raises:
        UserError: a part is missing, it is a refiner, or the scheduler is none that this family trains with.
    """

    name: ClassVar[str] = "sdxl"
    models: ClassVar[str] = "Stable Diffusion XL and what is derived from it"
    published = Published("stable-diffusion-xl-custom")
    space: ClassVar[Unsupported | None] = _UNSHARED
    pipelines: ClassVar[Sequence[str]] = ("StableDiffusionXLPipeline",)
    parts: ClassVar[Mapping[str, Part]] = {
        "denoiser": Part("unet", "diffusers.UNet2DConditionModel"),
        "vae": Part("vae", "diffusers.AutoencoderKL"),
        "text_encoder": Part("text_encoder", "transformers.CLIPTextModel", tokenizer="tokenizer"),
        "text_encoder_2": Part("text_encoder_2", "transformers.CLIPTextModelWithProjection", tokenizer="tokenizer_2"),
    }

    def __init__(self, folder: Path, source: str | None = None) -> None:
        index = read_json(folder / "model_index.json")
        if index.get("requires_aesthetics_score") or index.get("text_encoder", [None])[0] is None:
            raise UserError(
                f"{folder}: is SDXL's refiner, which finishes another model's pictures and cannot be trained on its "
                "own; train the base model"
            )
        super().__init__(folder, source)
        self.sites = Sites(
            linears=unet.linears(self.text_encoders),
            selections=unet.selections(self.text_encoders),
            readers=self.readers,
            vocabularies=list(self.vocabularies.values()),
            shared_space=_UNSHARED,
            # of the first encoder only the state before its last layer is read
            unread={"text_encoder": clip_text.last_layer(self.settings["text_encoder"])},
        )
        levels = {name: unet.missing_level(self.parts[name]) for name in self.text_encoders}
        self.export_names = {
            "denoiser": ExportNames(
                "unet", "lora_unet", places=original.places(self.settings["denoiser"]), single_file=True
            ),
            "text_encoder": ExportNames("text_encoder", "lora_te1", levels["text_encoder"], "clip_l"),
            "text_encoder_2": ExportNames("text_encoder_2", "lora_te2", levels["text_encoder_2"], "clip_g"),
        }
        if self.settings["denoiser"].get("cross_attention_dim") == _WIDTH:
            self.published = Published("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "SDXL")
        self.unguided_is_zero: bool = index.get("force_zeros_for_empty_prompt", True)

    def encode_prompt(self, captions: Sequence[str]) -> Conditioning:
        """Both encoders' hidden states before the last layer, side by side, and the second one's pooled answer.

        The empty caption is zeros where ``force_zeros_for_empty_prompt`` of the folder says that the pipeline's
        unconditional prompt is.
        """
        found = super().encode_prompt(captions)
        if not (self.unguided_is_zero and "" in captions):
            return found
        said = torch.tensor([caption != "" for caption in captions], device=found.tokens.device)
        assert found.pooled is not None
        return replace(found, tokens=found.tokens * said[:, None, None], pooled=found.pooled * said[:, None])

    def fingerprint(self, *networks: str) -> str:
        """As elsewhere; a text encoder's says too whether the empty caption is zeros."""
        found = super().fingerprint(*networks)
        if self.unguided_is_zero or not set(networks) & set(self.text_encoders):
            return found
        return hashlib.sha256(f"{found}, the empty caption is read".encode()).hexdigest()

    def read(self, texts: Sequence[str]) -> Conditioning:
        """As ``encode_prompt``, the empty text like any other."""
        first, second = (
            clip_text.penultimate(self.networks[name], self.tokenizers[name], texts, self.prompt_chunks)
            for name in self.text_encoders
        )
        return replace(second, tokens=torch.cat([first.tokens, second.tokens], dim=-1))

    def predict(self, noisy: Tensor, timesteps: Tensor, prompt: Conditioning, geometry: Tensor) -> Tensor:
        """The U-Net's answer, [B, C, h, w], for pictures of this ``geometry`` (section 2.2 of the paper)."""
        told = {"text_embeds": prompt.pooled, "time_ids": geometry.float()}
        return self.networks["denoiser"](
            noisy, timesteps, encoder_hidden_states=prompt.tokens, added_cond_kwargs=told, return_dict=False
        )[0]

    def pipeline_settings(self) -> dict[str, Any]:
        """As the folder says, without a watermark."""
        return {"force_zeros_for_empty_prompt": self.unguided_is_zero, "add_watermarker": False}


def tiny(path: Path, *, seed: int = 0) -> Path:
    """Write a ``StableDiffusionXLPipeline`` folder with random weights; see ``finetune.families.tiny``."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModelWithProjection

    from finetune.families.tiny import WIDTH, autoencoder, clip_text, ddim, drawn
    from finetune.tinyworld.tokenizer import build

    pooled, size, wider = 12, 8, 24  # the second encoder: diffusers tells the two in a single file apart by it
    with drawn(seed):
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(WIDTH, WIDTH, WIDTH),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=WIDTH + wider,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=size,
            projection_class_embeddings_input_dim=pooled + 6 * size,
        )
        StableDiffusionXLPipeline(
            vae=autoencoder(4),
            text_encoder=clip_text(eos_token_id=2),  # as the published settings have it, wrongly
            text_encoder_2=clip_text(
                CLIPTextModelWithProjection, hidden_size=wider, projection_dim=pooled, eos_token_id=2
            ),
            tokenizer=build(),
            tokenizer_2=build(),
            unet=unet.eval(),
            scheduler=ddim(),
        ).save_pretrained(path)
    return path


FAMILY = SDXL
