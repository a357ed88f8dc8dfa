"""What other tools can place: the names under which kohya's tools, ComfyUI and A1111 look for a file's layers.

Each function starts from the model and says which key stems the tool knows, as the tool's own loader does. A key that
is not among them is dropped there, most often without a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from finetune.export.names import Stems, parted
from finetune.family import ExportNames
from finetune.originals import Places
from finetune.originals import unet as original

Networks = Mapping[str, nn.Module]
Names = Mapping[str, ExportNames]

# classes inside which kohya's tools look
_BLOCKS = {"Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"}
_JOINT_BLOCKS = {"JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock"}
_TEXT_BLOCKS = {"CLIPAttention", "CLIPSdpaAttention", "CLIPMLP", "T5Attention", "T5DenseGatedActDense"}

_TEXT_LAYER = re.compile(
    r"(text_model\.)?encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
    r"|encoder\.block\.\d+\.layer\.(0\.SelfAttention\.[qkvo]|1\.DenseReluDense\.w(i_0|i_1|o))"
)
_RESNET = {
    "norm1": "in_layers_0",
    "conv1": "in_layers_2",
    "time_emb_proj": "emb_layers_1",
    "norm2": "out_layers_0",
    "conv2": "out_layers_3",
    "conv_shortcut": "skip_connection",
}


def kohya(networks: Networks, names: Names) -> dict[str, str]:
    """Stems that kohya's LoRA modules create: linear and convolution layers inside blocks of certain classes. Of SDXL
    diffusers' names are read as well.

    Returns:
        Key stem -> canonical module name; of several that are one layer there, the last one's.
    """
    found = {}
    for network, module in networks.items():
        blocks = _BLOCKS | _JOINT_BLOCKS if network == "denoiser" else _TEXT_BLOCKS
        stems = Stems(names[network])
        for path in _inside(module, blocks):
            found[stems.of(path)[0]] = f"{network}.{path}"
            if network == "denoiser" and is_unet(module):
                found[f"{names[network].kohya}_{path.replace('.', '_')}"] = f"{network}.{path}"
    return found


def comfyui(networks: Networks, names: Names) -> dict[str, str]:
    """Stems that ComfyUI makes of the layers that the original model has, and of diffusers' names for a U-Net's."""
    found = {}
    for network, module in networks.items():
        stems, known = Stems(names[network]), names[network].places or _original(module)
        for path in _layers(module):
            if path in known if network == "denoiser" else _TEXT_LAYER.fullmatch(path):
                found[stems.of(path)[0]] = f"{network}.{path}"
                if network == "denoiser" and is_unet(module):
                    found[f"{names[network].kohya}_{path.replace('.', '_')}"] = f"{network}.{path}"
    return found


def a1111(networks: Networks, names: Names) -> dict[str, str]:
    """Stems that A1111 looks up among the original U-Net's layers, or rewrites into their names by patterns.

    It knows the block counts of the published models alone; of another model they are taken from the model. It runs no
    transformer as a denoiser.
    """
    found: dict[str, str] = {}
    for network, module in networks.items():
        prefix = names[network].kohya
        if network != "denoiser":
            stems = Stems(names[network])
            found |= {stems.of(path)[0]: f"{network}.{path}" for path in _layers(module) if _TEXT_LAYER.fullmatch(path)}
        elif is_unet(module):
            known = _original(module)
            xl, there = bool(names[network].places), {place.path.replace(".", "_") for place in known.values()}
            for path, place in known.items():
                ours, theirs = (f"{prefix}_{name.replace('.', '_')}" for name in (path, place.path))
                if xl:
                    found[theirs] = f"{network}.{path}"
                # its pattern for this layer is that of SD 1, where the first level does not attend
                lost = xl and path == "up_blocks.0.upsamplers.0.conv"
                if a1111_name(ours, module) in there and not lost:
                    found[ours] = f"{network}.{path}"
    return found


TOOLS: Mapping[str, Callable[[Networks, Names], dict[str, str]]] = {"kohya": kohya, "comfyui": comfyui, "a1111": a1111}


def a1111_name(stem: str, unet: nn.Module) -> str | None:
    """The original U-Net's layer, dots as underscores, that A1111 takes a key stem in diffusers' names for; None where
    no pattern fits.
    """
    per_level = _layers_per_block(unet) + 1
    if found := re.fullmatch(r"lora_unet_(conv_in|conv_out|time_embedding_linear_[12])", stem):
        return original.places({})[parted(found[1])].path.replace(".", "_")
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
        place = 2 if "CrossAttn" in _config(unet)["up_block_types"][level] else 1  # behind attention layers
        return f"output_blocks_{per_level * level + per_level - 1}_{place}_conv"
    return None


def standard_geometry(denoiser: nn.Module) -> bool:
    """Whether the blocks are those of a published model, the only ones that A1111 and ComfyUI can run."""
    if not is_unet(denoiser):
        return int(_config(denoiser)["num_attention_heads"]) >= 24  # the smallest is SD 3 medium
    kinds, deep = tuple(_config(denoiser)["down_block_types"]), _config(denoiser)["transformer_layers_per_block"]
    attends, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    published = [((attends, attends, attends, plain), 1), ((plain, attends, attends), [1, 2, 10])]
    return (kinds, deep if isinstance(deep, int) else list(deep)) in published and _layers_per_block(denoiser) == 2


def is_unet(denoiser: nn.Module) -> bool:
    """Whether a denoiser is the U-Net of Stable Diffusion 1, 2 and XL."""
    return type(denoiser).__name__ == "UNet2DConditionModel"


def _original(unet: nn.Module) -> Places:
    """Places of the layers that a U-Net has, by diffusers' paths; none of another denoiser."""
    if not is_unet(unet):
        return {}
    there = set(_layers(unet))
    return {path: place for path, place in original.places(_config(unet)).items() if path in there}


def _suffix(kind: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if kind == "resnets" else rest


def _layers(module: nn.Module) -> Iterator[str]:
    for path, child in module.named_modules():
        if isinstance(child, (nn.Linear, nn.Conv2d)):
            yield path


def _inside(module: nn.Module, blocks: set[str]) -> Iterator[str]:
    for outer, block in module.named_modules():
        if type(block).__name__ in blocks:
            yield from (f"{outer}.{path}" for path in _layers(block))


def _layers_per_block(unet: nn.Module) -> int:
    count = _config(unet)["layers_per_block"]
    return int(count if isinstance(count, int) else count[0])


def _config(denoiser: nn.Module) -> Mapping[str, Any]:
    settings: Any = denoiser
    return settings.config  # type: ignore[no-any-return]
