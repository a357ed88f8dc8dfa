"""FLUX.1 (https://github.com/black-forest-labs/flux): queries, keys and values are one layer, in single blocks with the
first of the feed-forward layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.originals import Place, fused, renamed

_ENDS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "proj_out": "final_layer.linear",
}
_DOUBLE = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
}
_SINGLE = {
    "proj_out": "linear2",
    "norm.linear": "modulation.lin",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
}
_WIDER = 4  # the feed-forward layers of a single block than its attention


def places(settings: Mapping[str, Any]) -> dict[str, Place]:
    """The table of a transformer of these settings of ``FluxTransformer2DModel``; what they leave out is as in dev."""
    found = renamed(_ENDS) | {"norm_out.linear": Place("final_layer.adaLN_modulation.1", swapped=True)}
    for number in range(settings.get("num_layers", 19)):
        ours, block = f"transformer_blocks.{number}", f"double_blocks.{number}"
        found |= renamed({f"{ours}.{name}": f"{block}.{other}" for name, other in _DOUBLE.items()})
        found |= fused(f"{block}.img_attn.qkv", {f"{ours}.attn.to_{part}": 1 for part in "qkv"})
        found |= fused(f"{block}.txt_attn.qkv", {f"{ours}.attn.add_{part}_proj": 1 for part in "qkv"})
    for number in range(settings.get("num_single_layers", 38)):
        ours, block = f"single_transformer_blocks.{number}", f"single_blocks.{number}"
        attention = {f"{ours}.attn.to_{part}": 1 for part in "qkv"}
        found |= fused(f"{block}.linear1", attention | {f"{ours}.proj_mlp": _WIDER})
        found |= renamed({f"{ours}.{name}": f"{block}.{other}" for name, other in _SINGLE.items()})
    return found
