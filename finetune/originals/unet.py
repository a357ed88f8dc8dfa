"""The U-Net of Stable Diffusion 1, 2 and XL (https://github.com/Stability-AI/generative-models): blocks are numbered
through, from the input to the middle and from there to the output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.originals import Place, renamed

_ENDS = {
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
_ATTENTION = [f"attn{number}.to_{part}" for number in (1, 2) for part in ("q", "k", "v", "out.0")]
_TRANSFORMER = [*_ATTENTION, "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"]

_DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")


def places(settings: Mapping[str, Any]) -> dict[str, Place]:
    """The table of a U-Net of these settings of ``UNet2DConditionModel``; what they leave out is as in SD 1."""
    down, up = settings.get("down_block_types") or _DOWN, settings.get("up_block_types") or _UP
    layers = _each(settings.get("layers_per_block", 2), len(down))[0]
    depths = _each(settings.get("transformer_layers_per_block", 1), len(down))
    return renamed(
        {
            **_ENDS,
            **_input(down, layers, depths),
            **_resnet("mid_block.resnets.0", "middle_block.0"),
            **_attention("mid_block.attentions.0", "middle_block.1", depths[-1]),
            **_resnet("mid_block.resnets.1", "middle_block.2"),
            **_output(up, layers, depths[::-1]),
        }
    )


def _input(kinds: Sequence[str], layers: int, depths: Sequence[int]) -> dict[str, str]:
    """From ``conv_in``, which is block 0, to the middle."""
    found: dict[str, str] = {}
    for level, kind in enumerate(kinds):
        before = (layers + 1) * level + 1
        for index in range(layers):
            found |= _resnet(f"down_blocks.{level}.resnets.{index}", f"input_blocks.{before + index}.0")
            if _attends(kind):
                path = f"input_blocks.{before + index}.1"
                found |= _attention(f"down_blocks.{level}.attentions.{index}", path, depths[level])
        if level + 1 < len(kinds):
            found[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{before + layers}.0.op"
    return found


def _output(kinds: Sequence[str], layers: int, depths: Sequence[int]) -> dict[str, str]:
    """From the middle on; what makes a level larger lies in its last block, behind the others."""
    found: dict[str, str] = {}
    for level, kind in enumerate(kinds):
        before = (layers + 1) * level
        for index in range(layers + 1):
            found |= _resnet(f"up_blocks.{level}.resnets.{index}", f"output_blocks.{before + index}.0")
            if _attends(kind):
                path = f"output_blocks.{before + index}.1"
                found |= _attention(f"up_blocks.{level}.attentions.{index}", path, depths[level])
        if level + 1 < len(kinds):
            place = 2 if _attends(kind) else 1
            found[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{before + layers}.{place}.conv"
    return found


def _resnet(ours: str, path: str) -> dict[str, str]:
    return {f"{ours}.{name}": f"{path}.{other}" for name, other in _RESNET.items()}


def _attention(ours: str, path: str, depth: int) -> dict[str, str]:
    """Inside, names are the same."""
    inner = [f"transformer_blocks.{index}.{name}" for index in range(depth) for name in _TRANSFORMER]
    return {f"{ours}.{name}": f"{path}.{name}" for name in ("norm", "proj_in", *inner, "proj_out")}


def _attends(kind: str) -> bool:
    return "CrossAttn" in kind


def _each(setting: int | Sequence[int], levels: int) -> Sequence[int]:
    return [setting] * levels if isinstance(setting, int) else setting
