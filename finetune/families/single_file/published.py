"""Settings of the published models, which a single file does not hold, as the documents of a diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.families.single_file.layouts import SD1, SD2, SDXL, Layout

Documents = Mapping[str, Mapping[str, Any]]
"""JSON by its path in a diffusers folder."""

_ATTENTION_DOWN, _DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
_ATTENTION_UP, _UP = "CrossAttnUpBlock2D", "UpBlock2D"

_UNET = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
_UNET_SD = {
    **_UNET,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [_ATTENTION_DOWN, _ATTENTION_DOWN, _ATTENTION_DOWN, _DOWN],
    "up_block_types": [_UP, _ATTENTION_UP, _ATTENTION_UP, _ATTENTION_UP],
}
_UNET_SD1 = {**_UNET_SD, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
_UNET_SD2 = {
    **_UNET_SD,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,
}
_UNET_SDXL = {
    **_UNET,
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": [_DOWN, _ATTENTION_DOWN, _ATTENTION_DOWN],
    "up_block_types": [_ATTENTION_UP, _ATTENTION_UP, _UP],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
_VAE_SDXL = {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
_CLIP = {
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,  # as published: the end of a text is where its largest token is
    "pad_token_id": 1,
}
_CLIP_L = {
    **_CLIP,
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_CLIP_H = {  # without its last layer, which Stable Diffusion 2 does not read
    **_CLIP,
    "architectures": ["CLIPTextModel"],
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "projection_dim": 512,
}
_CLIP_G = {
    **_CLIP,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
_TOKENIZER = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": 77,
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
_TOKENIZER_OPENCLIP = {**_TOKENIZER, "pad_token": "!"}
_SD = {
    "_class_name": SD1.pipeline,
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}
_UNCHECKED = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}


def knows(layout: Layout) -> bool:
    """Whether there are settings for files of ``layout``: of the others there are several sizes, and T5's tokenizer."""
    return layout.name in _DOCUMENTS


def documents(layout: Layout, prediction: str) -> Documents:
    """Of the published model whose files have ``layout``; of SD 2 that for the sizes of ``prediction``."""
    return {**_DOCUMENTS[layout.name], **(_sizes(prediction) if layout is SD2 else {})}


def _sizes(prediction: str) -> Documents:
    """SD 2 predicts v at 768 pixels and epsilon at 512."""
    return {"unet/config.json": {**_UNET_SD2, "sample_size": 96 if prediction == "v_prediction" else 64}}


_DOCUMENTS: Mapping[str, Documents] = {
    SD1.name: {
        "model_index.json": {**_SD, **_UNCHECKED, "scheduler": ["diffusers", "PNDMScheduler"]},
        "unet/config.json": _UNET_SD1,
        "vae/config.json": _VAE,
        "text_encoder/config.json": _CLIP_L,
        "tokenizer/tokenizer_config.json": _TOKENIZER,
        "scheduler/scheduler_config.json": {
            **_SCHEDULER,
            "_class_name": "PNDMScheduler",
            "skip_prk_steps": True,
            "set_alpha_to_one": False,
        },
    },
    SD2.name: {
        "model_index.json": {**_SD, **_UNCHECKED, "scheduler": ["diffusers", "DDIMScheduler"]},
        "vae/config.json": {**_VAE, "sample_size": 768},
        "text_encoder/config.json": _CLIP_H,
        "tokenizer/tokenizer_config.json": _TOKENIZER_OPENCLIP,
        "scheduler/scheduler_config.json": {
            **_SCHEDULER,
            "_class_name": "DDIMScheduler",
            "clip_sample": False,  # latents are not bounded by 1
            "set_alpha_to_one": False,
        },
    },
    SDXL.name: {
        "model_index.json": {
            **_SD,
            "_class_name": SDXL.pipeline,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "force_zeros_for_empty_prompt": True,
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        },
        "unet/config.json": _UNET_SDXL,
        "vae/config.json": _VAE_SDXL,
        "text_encoder/config.json": _CLIP_L,
        "text_encoder_2/config.json": _CLIP_G,
        "tokenizer/tokenizer_config.json": _TOKENIZER,
        "tokenizer_2/tokenizer_config.json": _TOKENIZER_OPENCLIP,
        "scheduler/scheduler_config.json": {**_SCHEDULER, "_class_name": "EulerDiscreteScheduler"},
    },
}
