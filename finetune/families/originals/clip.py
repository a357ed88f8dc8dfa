"""Names of CLIP text encoders in single files: OpenAI's CLIP as transformers calls it, OpenCLIP's as
https://github.com/mlfoundations/open_clip does.
"""

from __future__ import annotations

from finetune.families.originals.place import Place, Settings

_LEVEL = "text_model."
_ALONE = {
    "text_model.embeddings.token_embedding.weight": Place("token_embedding.weight"),
    "text_model.embeddings.position_embedding.weight": Place("positional_embedding"),
    "text_model.final_layer_norm.weight": Place("ln_final.weight"),
    "text_model.final_layer_norm.bias": Place("ln_final.bias"),
    "text_projection.weight": Place("text_projection", form="transposed"),
}
_LAYERS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_THIRDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def in_full(name: str) -> str:
    """A weight's name with the level that some versions of transformers leave out of ``CLIPTextModel``."""
    return name if name.startswith((_LEVEL, "text_projection.")) else _LEVEL + name


def openai(name: str, settings: Settings) -> Place | None:
    """Of a weight of ``CLIPTextModel``, whose names such files have."""
    return Place(name) if name.startswith(_LEVEL) else None


def openclip(name: str, settings: Settings) -> Place | None:
    """Of a weight of ``CLIPTextModel`` or ``CLIPTextModelWithProjection``."""
    if name in _ALONE:
        return _ALONE[name]
    match name.split("."):
        case ["text_model", "encoder", "layers", index, *inner, weight]:
            layer, block = ".".join(inner), f"transformer.resblocks.{index}"
            if layer in _THIRDS:
                return Place(f"{block}.attn.in_proj_{weight}", third=_THIRDS.index(layer))
            return Place(f"{block}.{_LAYERS[layer]}.{weight}") if layer in _LAYERS else None
    return None
