"""Random-weight twins: true layer names and file layout, a few hundred kilobytes, made in a moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig

from finetune.objective import Prediction
from finetune.tinyworld.tokenizer import build

WIDTH = 16


def write_tiny_sd(
    path: Path, *, seed: int = 0, prediction: Prediction = "epsilon", linear_projection: bool = False
) -> Path:
    """Write a ``StableDiffusionPipeline`` folder with random weights, for 16-pixel pictures and 8-cell latents.

    Args:
        seed: of the weights; torch's global generator is left alone.
        linear_projection: attention blocks begin and end with linear layers, as in SD 2.x, and not with 1x1
            convolutions, as in SD 1.x.

    Returns:
        ``path``, ready for ``load_family(ModelConfig(path=str(path)))``.
    """
    with drawn(seed):
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(WIDTH, WIDTH),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=WIDTH,
            use_linear_projection=linear_projection,
        )
        vae = autoencoder(4)
        text_encoder = clip_text()
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=build(),
        unet=unet.eval(),
        scheduler=ddim(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)
    return path


@contextmanager
def drawn(seed: int) -> Iterator[None]:
    """Inside, torch's global generator begins at ``seed``; afterwards it is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def autoencoder(channels: int, **settings: Any) -> AutoencoderKL:
    """Two pixels per latent cell."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **settings,
    ).eval()


def unquantised(scaling_factor: float, shift_factor: float) -> AutoencoderKL:
    """As of SD 3 and Flux: latents are shifted, and no layer stands between them and the rest."""
    return autoencoder(
        4,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def clip_text(kind: Callable[[CLIPTextConfig], Any] = CLIPTextModel, **settings: Any) -> Any:
    """A CLIP text encoder of two layers, ``WIDTH`` wide, for the embedded world's tokenizer."""
    tokenizer = build()
    config = CLIPTextConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": tokenizer.model_max_length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **settings,
        }
    )
    return kind(config).eval()


def ddim(prediction: Prediction = "epsilon") -> DDIMScheduler:
    """Stable Diffusion's table of noise."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,  # latents are not bounded by 1
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )


def write_tiny_clip(path: Path, base: Path, *, seed: int = 0) -> Path:
    """Write a ``CLIPModel`` folder whose text tower is the text encoder of ``base``; the rest has random weights.

    Args:
        base: what ``write_tiny_sd`` wrote.
        seed: of the image tower and the two projections, 8 wide.
    """
    text = CLIPTextModel.from_pretrained(base, subfolder="text_encoder", local_files_only=True)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = CLIPConfig(text_config=text.config.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = CLIPModel(config)
    getattr(clip.text_model, "text_model", clip.text_model).load_state_dict(text.state_dict())
    clip.save_pretrained(path)
    return path
