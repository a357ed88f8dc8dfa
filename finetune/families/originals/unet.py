"""Names of the U-Net in the code of Stable Diffusion (https://github.com/CompVis/stable-diffusion) and of SDXL
(https://github.com/Stability-AI/generative-models).

They count blocks through all levels, where diffusers counts them within each: a level has as many input blocks as it
has layers and one more that makes the picture smaller, and as many output blocks as that together.
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune.families.originals.place import Place, Settings

_ALONE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def place(name: str, settings: Settings) -> Place | None:
    """Of a weight of ``UNet2DConditionModel``."""
    module, _, weight = name.rpartition(".")
    found = _module(module, settings)
    return Place(f"{found}.{weight}") if found else None


def _module(module: str, settings: Settings) -> str | None:
    if module in _ALONE:
        return _ALONE[module]
    layers = settings.get("layers_per_block", 2)
    if not isinstance(layers, int):
        return None  # a number for each level: no original has it
    blocks = layers + 1
    match module.split("."):
        case ["down_blocks", level, "downsamplers", "0", "conv"]:
            return f"input_blocks.{blocks * (int(level) + 1)}.0.op"
        case ["up_blocks", level, "upsamplers", "0", "conv"]:
            behind = 2 if "CrossAttn" in settings["up_block_types"][int(level)] else 1
            return f"output_blocks.{blocks * int(level) + layers}.{behind}.conv"
        case ["down_blocks", level, kind, index, *inner]:
            return _layer(f"input_blocks.{1 + blocks * int(level) + int(index)}", kind, inner)
        case ["up_blocks", level, kind, index, *inner]:
            return _layer(f"output_blocks.{blocks * int(level) + int(index)}", kind, inner)
        case ["mid_block", "resnets", ("0" | "1") as index, inner] if inner in _RESNET:
            return f"middle_block.{2 * int(index)}.{_RESNET[inner]}"
        case ["mid_block", "attentions", "0", *inner]:
            return f"middle_block.1.{'.'.join(inner)}"
    return None


def _layer(block: str, kind: str, inner: Sequence[str]) -> str | None:
    """Attention stands behind the resnet of its block, and its own layers are called as in diffusers."""
    match kind, *inner:
        case "attentions", *_:
            return f"{block}.1.{'.'.join(inner)}"
        case "resnets", layer if layer in _RESNET:
            return f"{block}.0.{_RESNET[layer]}"
    return None
