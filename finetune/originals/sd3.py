"""Stable Diffusion 3 and 3.5 (https://github.com/Stability-AI/sd3.5): blocks of two streams, the picture's and the
prompt's, each with queries, keys and values in one layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.originals import Place, fused, renamed

_ENDS = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
}
_EVERY = {  # in every block
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "norm1.linear": "x_block.adaLN_modulation.1",
}
_SECOND = {
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
}
_PROMPT = {
    "attn.to_add_out": "context_block.attn.proj",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
}


def places(settings: Mapping[str, Any]) -> dict[str, Place]:
    """The table of a transformer of these settings of ``SD3Transformer2DModel``; what they leave out is as in 3 medium.

    In the last block nothing is made of the prompt's stream any more: it has queries, keys, values and a modulation
    of two parts, shift and scale, which diffusers has the other way round as it has the last layer's.
    """
    found = renamed(_ENDS) | {"norm_out.linear": Place("final_layer.adaLN_modulation.1", swapped=True)}
    count, dual = settings.get("num_layers", 24), settings.get("dual_attention_layers") or ()
    for number in range(count):
        ours, block = f"transformer_blocks.{number}", f"joint_blocks.{number}"
        found |= renamed({f"{ours}.{name}": f"{block}.{other}" for name, other in _EVERY.items()})
        found |= fused(f"{block}.x_block.attn.qkv", {f"{ours}.attn.to_{part}": 1 for part in "qkv"})
        found |= fused(f"{block}.context_block.attn.qkv", {f"{ours}.attn.add_{part}_proj": 1 for part in "qkv"})
        if number in dual:
            found |= fused(f"{block}.x_block.attn2.qkv", {f"{ours}.attn2.to_{part}": 1 for part in "qkv"})
            found |= renamed({f"{ours}.{name}": f"{block}.{other}" for name, other in _SECOND.items()})
        if number < count - 1:
            found |= renamed({f"{ours}.{name}": f"{block}.{other}" for name, other in _PROMPT.items()})
        else:
            modulation = f"{block}.context_block.adaLN_modulation.1"
            found[f"{ours}.norm1_context.linear"] = Place(modulation, swapped=True)
    return found
