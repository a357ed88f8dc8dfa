"""The CLIP text encoders of SD 2 and SDXL, as OpenCLIP has them (https://github.com/mlfoundations/open_clip)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.originals import Place, fused, renamed

_ENDS = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
}
_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def places(settings: Mapping[str, Any]) -> dict[str, Place]:
    """The table of an encoder of these settings of ``CLIPTextModel``, whose names all have their ``text_model.``."""
    found = renamed(_ENDS) | {"text_projection.weight": Place("text_projection", form="transposed")}
    for number in range(settings["num_hidden_layers"]):
        ours, block = f"text_model.encoder.layers.{number}", f"transformer.resblocks.{number}"
        found |= renamed({f"{ours}.{name}": f"{block}.{other}" for name, other in _LAYER.items()})
        for kind in ("weight", "bias"):
            thirds = {f"{ours}.self_attn.{part}_proj.{kind}": 1 for part in "qkv"}
            found |= fused(f"{block}.attn.in_proj_{kind}", thirds)
    return found
