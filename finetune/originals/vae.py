"""The autoencoder of latent diffusion (https://github.com/CompVis/latent-diffusion), also that of SD 3 and FLUX.1.

The decoder's levels are counted from the picture inwards, in diffusers the other way. Attention layers are convolutions
of 1x1 cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.originals import Place, renamed

_ENDS = ("quant_conv", "post_quant_conv", "encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out")
_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
_ATTENTION = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    # diffusers' own names before 0.15, which the files of SD 1.5 and 2.1 still have
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}


def places(settings: Mapping[str, Any]) -> dict[str, Place]:
    """The table of an autoencoder of these settings of ``AutoencoderKL``."""
    levels, layers = len(settings["block_out_channels"]), settings.get("layers_per_block", 1)
    found = renamed({name: name for name in _ENDS})
    for side in ("encoder", "decoder"):
        found[f"{side}.conv_norm_out"] = Place(f"{side}.norm_out")
        found |= _middle(side)
    for level in range(levels):
        down, up = f"encoder.down.{level}", f"decoder.up.{levels - 1 - level}"
        for index in range(layers):
            found |= _resnet(f"encoder.down_blocks.{level}.resnets.{index}", f"{down}.block.{index}")
        for index in range(layers + 1):
            found |= _resnet(f"decoder.up_blocks.{level}.resnets.{index}", f"{up}.block.{index}")
        if level + 1 < levels:
            found[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = Place(f"{down}.downsample.conv")
            found[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = Place(f"{up}.upsample.conv")
    return found


def _middle(side: str) -> dict[str, Place]:
    attention, there = f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1"
    return {
        **_resnet(f"{side}.mid_block.resnets.0", f"{side}.mid.block_1"),
        **_resnet(f"{side}.mid_block.resnets.1", f"{side}.mid.block_2"),
        f"{attention}.group_norm": Place(f"{there}.norm"),
        **{f"{attention}.{ours}": Place(f"{there}.{name}", form="convolution") for ours, name in _ATTENTION.items()},
    }


def _resnet(ours: str, path: str) -> dict[str, Place]:
    return renamed({f"{ours}.{name}": f"{path}.{other}" for name, other in _RESNET.items()})
