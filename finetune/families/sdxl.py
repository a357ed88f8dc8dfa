"""Stable Diffusion XL: two CLIP text encoders and a U-Net that is told each picture's size and crop (Podell et al.
2023, https://arxiv.org/abs/2307.01952).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from finetune.batch import Conditioning
from finetune.errors import UserError
from finetune.families import clip_text, unet
from finetune.families.folder import DiffusersFolder, Part, read_json
from finetune.family import ExportNames, Sites, Unsupported

_UNSHARED = Unsupported("it reads states from within its CLIPs, and not what they compare with pictures")


class SDXL(DiffusersFolder):
    """A folder in the layout of ``StableDiffusionXLPipeline``.

    Args:
        min_snr_gamma: as in ``finetune.objective.DDPM``.

    Raises:
        UserError: a part is missing, it is a refiner, or the scheduler is none that this family trains with.
    """

    name: ClassVar[str] = "sdxl"
    models: ClassVar[str] = "Stable Diffusion XL and what is derived from it"
    readers: ClassVar[tuple[str, str] | Unsupported] = unet.READERS
    space: ClassVar[Unsupported | None] = _UNSHARED
    pipelines: ClassVar[Sequence[str]] = ("StableDiffusionXLPipeline",)
    parts: ClassVar[Mapping[str, Part]] = {
        "denoiser": Part("unet", "diffusers.UNet2DConditionModel"),
        "vae": Part("vae", "diffusers.AutoencoderKL"),
        "text_encoder": Part("text_encoder", "transformers.CLIPTextModel", tokenizer="tokenizer"),
        "text_encoder_2": Part("text_encoder_2", "transformers.CLIPTextModelWithProjection", tokenizer="tokenizer_2"),
    }

    def __init__(self, folder: Path, source: str | None = None, min_snr_gamma: float | None = None) -> None:
        index = read_json(folder / "model_index.json")
        if index.get("requires_aesthetics_score") or index.get("text_encoder", [None])[0] is None:
            raise UserError(
                f"{folder}: is SDXL's refiner, which finishes another model's pictures and cannot be trained on its "
                "own; train the base model"
            )
        super().__init__(folder, source)
        unet.refuse_inpainting(self)
        self.pixel_multiple = self.latent_scale * 2 ** (len(self.settings["denoiser"]["block_out_channels"]) - 1)
        self.objective = unet.ddpm(folder, self.scheduler(), min_snr_gamma)
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
            "denoiser": ExportNames("unet", "lora_unet"),
            "text_encoder": ExportNames("text_encoder", "lora_te1", levels["text_encoder"], "clip_l"),
            "text_encoder_2": ExportNames("text_encoder_2", "lora_te2", levels["text_encoder_2"], "clip_g"),
        }
        self._empty_is_zero: bool = index.get("force_zeros_for_empty_prompt", True)

    def encode_prompt(self, captions: Sequence[str]) -> Conditioning:
        """Both encoders' hidden states before the last layer, side by side, and the second one's pooled answer.

        The empty caption is zeros where ``force_zeros_for_empty_prompt`` of the folder says that the pipeline's
        unconditional prompt is.
        """
        read = [
            clip_text.penultimate(self.networks[name], self.vocabularies[name], captions) for name in self.text_encoders
        ]
        tokens, pooled = torch.cat([hidden for hidden, _ in read], dim=-1), read[-1][1]
        if self._empty_is_zero and "" in captions:
            said = torch.tensor([caption != "" for caption in captions], device=tokens.device)
            tokens, pooled = tokens * said[:, None, None], pooled * said[:, None]
        return Conditioning(tokens=tokens, pooled=pooled)

    def caption_overflow(self, caption: str, words: Mapping[str, int] | None = None) -> int:
        """How many tokens of ``caption`` are cut off, where ``words`` are as many tokens as they say."""
        return max(clip_text.overflow(tokenizer, caption, words) for tokenizer in self.tokenizers.values())

    def predict(self, noisy: Tensor, timesteps: Tensor, prompt: Conditioning, geometry: Tensor) -> Tensor:
        """The U-Net's answer, [B, C, h, w], for pictures of this ``geometry`` (section 2.2 of the paper)."""
        told = {"text_embeds": prompt.pooled, "time_ids": geometry.to(prompt.tokens.dtype)}
        return self.networks["denoiser"](
            noisy, timesteps, encoder_hidden_states=prompt.tokens, added_cond_kwargs=told, return_dict=False
        )[0]

    def pipeline_settings(self) -> dict[str, Any]:
        """As the folder says, without a watermark."""
        return {"force_zeros_for_empty_prompt": self._empty_is_zero, "add_watermarker": False}


def tiny(path: Path, *, seed: int = 0) -> Path:
    """Write a ``StableDiffusionXLPipeline`` folder with random weights; see ``finetune.families.tiny``."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModelWithProjection

    from finetune.families.tiny import WIDTH, autoencoder, clip_text, ddim, drawn
    from finetune.tinyworld.tokenizer import build

    pooled, size = 12, 8
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
            cross_attention_dim=2 * WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=size,
            projection_class_embeddings_input_dim=pooled + 6 * size,
        )
        StableDiffusionXLPipeline(
            vae=autoencoder(4),
            text_encoder=clip_text(eos_token_id=2),  # as the published settings have it, wrongly
            text_encoder_2=clip_text(CLIPTextModelWithProjection, projection_dim=pooled, eos_token_id=2),
            tokenizer=build(),
            tokenizer_2=build(),
            unet=unet.eval(),
            scheduler=ddim(),
        ).save_pretrained(path)
    return path


FAMILY = SDXL
