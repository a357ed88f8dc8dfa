"""Names of the autoencoder in the code of latent diffusion (https://github.com/CompVis/latent-diffusion).

The decoder's levels are counted from the picture inwards, in diffusers the other way. Attention layers are convolutions
of 1x1 cells.
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune.families.originals.place import Place, Settings

_SAME = ("quant_conv", "post_quant_conv", "encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out")
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


def place(name: str, settings: Settings) -> Place | None:
    """Of a weight of ``AutoencoderKL``."""
    module, _, weight = name.rpartition(".")
    if module in _SAME:
        return Place(name)
    side, *inner = module.split(".")
    if side not in ("encoder", "decoder"):
        return None
    match inner:
        case ["mid_block", "attentions", "0", "group_norm"]:
            return Place(f"{side}.mid.attn_1.norm.{weight}")
        case ["mid_block", "attentions", "0", *layer] if ".".join(layer) in _ATTENTION:
            key = f"{side}.mid.attn_1.{_ATTENTION['.'.join(layer)]}.{weight}"
            return Place(key, form="convolution" if weight == "weight" else "same")
    found = _module(side, inner, len(settings["block_out_channels"]))
    return Place(f"{side}.{found}.{weight}") if found else None


def _module(side: str, inner: Sequence[str], levels: int) -> str | None:
    match inner:
        case ["conv_norm_out"]:
            return "norm_out"
        case ["mid_block", "resnets", index, layer]:
            return f"mid.block_{int(index) + 1}.{_resnet(layer)}"
        case ["down_blocks", level, "resnets", index, layer] if side == "encoder":
            return f"down.{level}.block.{index}.{_resnet(layer)}"
        case ["down_blocks", level, "downsamplers", "0", "conv"] if side == "encoder":
            return f"down.{level}.downsample.conv"
        case ["up_blocks", level, "resnets", index, layer] if side == "decoder":
            return f"up.{levels - 1 - int(level)}.block.{index}.{_resnet(layer)}"
        case ["up_blocks", level, "upsamplers", "0", "conv"] if side == "decoder":
            return f"up.{levels - 1 - int(level)}.upsample.conv"
    return None


def _resnet(layer: str) -> str:
    return "nin_shortcut" if layer == "conv_shortcut" else layer
