"""What other tools can place: the names under which kohya's tools, ComfyUI and A1111 look for a file's layers.

Each function starts from the model and says which key stems the tool knows, as the tool's own loader does. A key that
is not among them is dropped there, most often without a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from finetune.export.names import parted
from finetune.family import ExportNames

Networks = Mapping[str, nn.Module]
Names = Mapping[str, ExportNames]

_BLOCKS = {"Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"}
_TEXT_BLOCKS = {"CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def kohya(networks: Networks, names: Names) -> dict[str, str]:
    """Stems that kohya's LoRA module creates: linear and convolution layers inside blocks of certain classes.

    Returns:
        Key stem -> canonical module name.
    """
    found = {}
    for network, module in networks.items():
        blocks = _BLOCKS if network == "denoiser" else _TEXT_BLOCKS
        for path in _inside(module, blocks):
            found[_stem(names[network], path)] = f"{network}.{path}"
    return found


def comfyui(networks: Networks, names: Names) -> dict[str, str]:
    """Stems that ComfyUI derives by walking the original U-Net's layers under diffusers' names."""
    found = {}
    for network, module in networks.items():
        for path in _layers(module):
            known = ldm_name(path, module) if network == "denoiser" else _text_layer(path)
            if known:
                found[_stem(names[network], path)] = f"{network}.{path}"
    return found


def a1111(networks: Networks, names: Names) -> dict[str, str]:
    """Stems that A1111 rewrites, by patterns on the key itself, into names of the original U-Net's layers.

    It knows the block counts of SD 1 and 2 alone; of another model they are taken from the model.
    """
    found = {}
    for network, module in networks.items():
        unet = network == "denoiser"
        names_there = (ldm_name(path, module) for path in _layers(module)) if unet else ()
        original = {name.replace(".", "_") for name in names_there if name}
        for path in _layers(module):
            stem = _stem(names[network], path)
            if a1111_name(stem, module) in original if unet else _text_layer(path):
                found[stem] = f"{network}.{path}"
    return found


TOOLS: Mapping[str, Callable[[Networks, Names], dict[str, str]]] = {"kohya": kohya, "comfyui": comfyui, "a1111": a1111}


def ldm_name(path: str, unet: nn.Module) -> str | None:
    """What the original Stable Diffusion code calls a layer of ``UNet2DConditionModel``; None where it has none."""
    if path in _TOP:
        return _TOP[path]
    parts = path.split(".")
    if parts[0] == "mid_block" and len(parts) > 3:
        place = {("resnets", "0"): 0, ("attentions", "0"): 1, ("resnets", "1"): 2}.get((parts[1], parts[2]))
        return None if place is None else _inner(f"middle_block.{place}", parts[1], parts[3:])
    if parts[0] not in ("down_blocks", "up_blocks") or len(parts) < 5:
        return None
    per_level = _layers_per_block(unet) + 1
    level, kind, index = int(parts[1]), parts[2], int(parts[3])
    if kind == "downsamplers":
        return f"input_blocks.{per_level * (level + 1)}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{per_level * level + per_level - 1}.{_upsampler_place(level, unet)}.conv"
    prefix, first = ("input_blocks", 1) if parts[0] == "down_blocks" else ("output_blocks", 0)
    block = f"{prefix}.{first + per_level * level + index}.{0 if kind == 'resnets' else 1}"
    return _inner(block, kind, parts[4:])


def a1111_name(stem: str, unet: nn.Module) -> str | None:
    """The original U-Net's layer, dots as underscores, that A1111 takes a key stem for; None where no pattern fits."""
    per_level = _layers_per_block(unet) + 1
    if found := re.fullmatch(r"lora_unet_(conv_in|conv_out|time_embedding_linear_[12])", stem):
        return _TOP[parted(found[1])].replace(".", "_")
    if found := re.fullmatch(r"lora_unet_(down|up)_blocks_(\d+)_(resnets|attentions)_(\d+)_(.+)", stem):
        way, level, kind, index, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        prefix, first = ("input_blocks", 1) if way == "down" else ("output_blocks", 0)
        return f"{prefix}_{first + per_level * level + index}_{int(kind == 'attentions')}_{_suffix(kind, rest)}"
    if found := re.fullmatch(r"lora_unet_mid_block_(resnets|attentions)_(\d+)_(.+)", stem):
        place = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"middle_block_{place}_{_suffix(found[1], found[3])}"
    if found := re.fullmatch(r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv", stem):
        return f"input_blocks_{per_level * (int(found[1]) + 1)}_0_op"
    if found := re.fullmatch(r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv", stem):
        level = int(found[1])
        return f"output_blocks_{per_level * level + per_level - 1}_{_upsampler_place(level, unet)}_conv"
    return None


def standard_geometry(unet: nn.Module) -> bool:
    """Whether the blocks are those of SD 1 and 2, the only ones that A1111 and ComfyUI can run."""
    kinds = tuple(_config(unet)["down_block_types"])
    return kinds == ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",) and _layers_per_block(unet) == 2


def _inner(block: str, kind: str, rest: list[str]) -> str | None:
    """Inside a block: attention layers keep their names, those of resnets have others."""
    if kind == "attentions":
        return f"{block}.{'.'.join(rest)}"
    return f"{block}.{_RESNET[rest[0]]}" if rest[0] in _RESNET else None


def _suffix(kind: str, rest: str) -> str:
    return _RESNET.get(rest, rest).replace(".", "_") if kind == "resnets" else rest


def _stem(called: ExportNames, path: str) -> str:
    return f"{called.kohya}_{called.missing_level}{path}".replace(".", "_")


def _text_layer(path: str) -> bool:
    pattern = r"(text_model\.)?encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
    return re.fullmatch(pattern, path) is not None


def _layers(module: nn.Module) -> Iterator[str]:
    for path, child in module.named_modules():
        if isinstance(child, (nn.Linear, nn.Conv2d)):
            yield path


def _inside(module: nn.Module, blocks: set[str]) -> Iterator[str]:
    for outer, block in module.named_modules():
        if type(block).__name__ in blocks:
            yield from (f"{outer}.{path}" for path in _layers(block))


def _upsampler_place(level: int, unet: nn.Module) -> int:
    """Position in its block: behind the attention layers, where the level has any."""
    return 2 if "CrossAttn" in _config(unet)["up_block_types"][level] else 1


def _layers_per_block(unet: nn.Module) -> int:
    count = _config(unet)["layers_per_block"]
    return int(count if isinstance(count, int) else count[0])


def _config(unet: nn.Module) -> Mapping[str, Any]:
    settings: Any = unet
    return settings.config  # type: ignore[no-any-return]
