"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a cross-attention U-Net (Rombach et al. 2022,
https://arxiv.org/abs/2112.10752).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from finetune.batch import Conditioning
from finetune.families import clip_text, unet
from finetune.families.clip import shared_space
from finetune.families.parts import Part
from finetune.families.unet import UNetFolder
from finetune.family import ExportNames, Published, Sites, Unsupported

_PUBLISHED = {
    768: Published("stable-diffusion-v1", "sd_v1", "SD1"),
    1024: Published("stable-diffusion-v2", "sd_v2", "SD2"),
}
"""By the size of a prompt's token vectors."""


class SD(UNetFolder):
    """A folder in the layout of ``StableDiffusionPipeline``.

    Raises:
        UserError: a part is missing, or the scheduler is none that this family trains with.
    """

    name: ClassVar[str] = "sd"
    models: ClassVar[str] = "Stable Diffusion 1.x, 2.x and what is derived from them"
    space: ClassVar[Unsupported | None] = None
    pipelines: ClassVar[Sequence[str]] = ("StableDiffusionPipeline",)
    parts: ClassVar[Mapping[str, Part]] = {
        "denoiser": Part("unet", "diffusers.UNet2DConditionModel"),
        "vae": Part("vae", "diffusers.AutoencoderKL"),
        "text_encoder": Part("text_encoder", "transformers.CLIPTextModel", tokenizer="tokenizer"),
    }

    def __init__(self, folder: Path, source: str | None = None) -> None:
        super().__init__(folder, source)
        self.tokenizer = self.tokenizers["text_encoder"]
        self.published = _PUBLISHED.get(self.settings["denoiser"].get("cross_attention_dim", 0), Published())
        self.sites = Sites(
            linears=unet.linears(self.text_encoders),
            selections=unet.selections(self.text_encoders),
            readers=self.readers,
            vocabularies=list(self.vocabularies.values()),
            shared_space=lambda clip: shared_space(self.fresh("text_encoder"), clip),
        )
        self.export_names = {
            "denoiser": ExportNames("unet", "lora_unet", single_file=True),
            "text_encoder": ExportNames("text_encoder", "lora_te", unet.missing_level(self.parts["text_encoder"])),
        }

    def read(self, texts: Sequence[str]) -> Conditioning:
        """The encoder's last hidden states after its final norm, as the pipeline's own ``encode_prompt`` gives them."""
        return clip_text.final(self.networks["text_encoder"], self.tokenizer, texts, self.prompt_chunks)

    def predict(self, noisy: Tensor, timesteps: Tensor, prompt: Conditioning, geometry: Tensor) -> Tensor:
        """The U-Net's answer, [B, C, h, w]. It does not look at ``geometry``."""
        return self.networks["denoiser"](noisy, timesteps, encoder_hidden_states=prompt.tokens, return_dict=False)[0]

    def pipeline_settings(self) -> dict[str, Any]:
        """No safety checker: it judges pictures, and is no part of the model."""
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def tiny(path: Path, *, seed: int = 0) -> Path:
    """Write a ``StableDiffusionPipeline`` folder with random weights."""
    from finetune.families.tiny import write_tiny_sd

    return write_tiny_sd(path, seed=seed)


FAMILY = SD
