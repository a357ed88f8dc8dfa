"""Tiny random SAM, SAM 2 and CLIPSeg with the layout of the real ones, saved as those are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SIDE, HIDDEN = 64, 32
DECODER = {
    "hidden_size": HIDDEN,
    "mlp_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "iou_head_depth": 2,
    "iou_head_hidden_dim": HIDDEN,
}


@pytest.fixture(scope="session")
def tiny_sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a SAM of 64 pixels and 16 x 16 cells; for reading only."""
    from transformers import SamConfig, SamModel

    torch.manual_seed(0)
    config = SamConfig(
        vision_config={
            "hidden_size": 16,
            "output_channels": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 4,
            "mlp_dim": 32,
            "window_size": 4,
            "global_attn_indexes": [1],
            "num_pos_feats": HIDDEN // 2,
        },
        prompt_encoder_config={"hidden_size": HIDDEN, "image_size": SIDE, "patch_size": 4, "mask_input_channels": 4},
        mask_decoder_config=DECODER,
    )
    return saved(SamModel(config), tmp_path_factory.mktemp("sam"), {"image_processor_type": "SamImageProcessor"})


@pytest.fixture(scope="session")
def tiny_sam2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a SAM 2 of 64 pixels and 4 x 4 cells; for reading only."""
    from transformers import Sam2Config, Sam2Model

    torch.manual_seed(1)
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "num_attention_heads": 1,
        "image_size": [SIDE, SIDE],
        "window_positional_embedding_background_size": [4, 4],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_size_per_stage": [4, 4, 4, 4],
        "global_attention_blocks": [3],
    }
    config = Sam2Config(
        vision_config={
            "backbone_config": backbone,
            "backbone_channel_list": [64, 32, 16, 8],
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "fpn_hidden_size": HIDDEN,
        },
        prompt_encoder_config={"hidden_size": HIDDEN, "image_size": SIDE, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config=DECODER,
    )
    return saved(Sam2Model(config), tmp_path_factory.mktemp("sam2"), {"image_processor_type": "Sam2ImageProcessorFast"})


def saved(model: Any, folder: Path, preprocessing: dict[str, Any]) -> Path:
    with torch.no_grad():
        for weights in model.parameters():  # as they are drawn they hardly tell prompts apart
            weights.normal_(std=0.3)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**IMAGENET, **preprocessing}))
    return folder


@pytest.fixture(scope="session")
def tiny_clipseg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a CLIPSeg with the tokenizer of the embedded world; for reading only."""
    from transformers import (
        CLIPSegConfig,
        CLIPSegForImageSegmentation,
        CLIPSegProcessor,
        CLIPTokenizer,
        ViTImageProcessor,
    )

    from finetune.tinyworld import BASE

    torch.manual_seed(2)
    tokenizer = CLIPTokenizer.from_pretrained(BASE, subfolder="tokenizer", local_files_only=True)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = CLIPSegConfig(
        text_config={
            **tower,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tokenizer.model_max_length,
            "eos_token_id": tokenizer.eos_token_id,  # whose features are those of the text
        },
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=16,
        reduce_dim=8,
        extract_layers=[0, 1, 2],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    folder = tmp_path_factory.mktemp("clipseg")
    CLIPSegForImageSegmentation(config).save_pretrained(folder)
    images = ViTImageProcessor(size={"height": 48, "width": 48}, **IMAGENET)
    CLIPSegProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def noise() -> Image.Image:
    """A picture of 50 x 30 random pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
