"""A U-Net that the tests of hypernetworks share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypernetworks import CONTEXT, WIDTH


@pytest.fixture(scope="module")
def make_unet() -> Callable[[], UNet2DConditionModel]:
    """A U-Net whose prompt is wider than its hidden states."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(WIDTH, WIDTH),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=CONTEXT,
        )
    state = made.state_dict()

    def make() -> UNet2DConditionModel:
        unet = UNet2DConditionModel.from_config(made.config)
        unet.load_state_dict(state)
        return unet.eval().requires_grad_(False)

    return make
