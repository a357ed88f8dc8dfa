"""Keys of adapter files, whoever wrote them: which layout, which network, which layer and which part of its change."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_PARTS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.bias": "bias",
    "lora_B.bias": "bias",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "magnitude": "magnitude",
    "dora_scale": "dora_scale",
    "alpha": "alpha",
    "oft_R.weight": "oft_R",
    "oft_blocks": "oft_blocks",
    **{part: part for part in ("diff", "diff_b", "set_weight", "w_norm", "b_norm", "reshape_weight")},
    **{f"hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
_ENDING = re.compile(rf"(.+?)[._]({'|'.join(map(re.escape, sorted(_PARTS, key=len, reverse=True)))})")

_LAYOUTS = (
    ("bundle", re.compile(r"(bundle_emb)\.(.+)")),
    ("kohya", re.compile(r"(lora_unet|lora_te\d?|lora_transformer|lycoris)_(\w+)")),
    ("comfyui", re.compile(r"(diffusion_model|text_encoders\.\w+\.transformer)\.(.+)")),
    ("peft", re.compile(r"(base_model\.model)\.(.+)")),
    ("diffusers", re.compile(r"(unet|transformer|text_encoder(?:_[23])?)\.(.+)")),
)
"""Layout -> how the key of a layer begins, and its path. Of kohya's names the path is one word."""

_OLD = re.compile(r"_lora\.(down|up)\.weight$|\.lora(_linear_layer)?\.(down|up)\.weight$")


@dataclass(frozen=True)
class Key:
    """What a key says.

    Attributes:
        text: the key.
        layout: a name of the layouts here; "before peft" of diffusers' files from before it used PEFT.
        network: how it begins: "lora_unet", "text_encoder".
        path: of the layer; in kohya's names with underscores for dots.
        part: of the layer's change: "down", "up", "alpha", "lokr_w1".
    """

    text: str
    layout: str
    network: str
    path: str
    part: str

    @property
    def layer(self) -> str:
        """The layer, with its network."""
        return f"{self.network} {self.path}"

    @property
    def word(self) -> str:
        """The path with underscores for dots, as every layout can be compared."""
        return self.path.replace(".processor.", ".").replace(".", "_")


def parse(text: str) -> Key | None:
    """What a key says; None where it is none of a low-rank layer, a LyCORIS layer or a difference."""
    if text.startswith("bundle_emb."):
        return Key(text, "bundle", "bundle_emb", text.removeprefix("bundle_emb."), "word")
    ending = _ENDING.fullmatch(text)
    if not ending:
        return None
    for layout, start in _LAYOUTS:
        if found := start.fullmatch(ending[1]):
            name = "before peft" if layout == "diffusers" and _OLD.search(text) else layout
            return Key(text, name, found[1], found[2], _PARTS[ending[2]])
    return None


def algorithm(parts: Iterable[str]) -> str:
    """What the parts of a layer are a change of: "lora", "dora", "locon with a middle", "loha", "lokr", "oft",
    "difference".
    """
    found = set(parts)
    if found & {"oft_R", "oft_blocks"}:
        return "oft"
    for name, mark in (("loha", "hada_w1_a"), ("lokr", "lokr_w")):
        if any(part.startswith(mark) for part in found):
            return name
    if "down" in found:
        scaled = found & {"magnitude", "dora_scale"}
        return "dora" if scaled else "tucker" if "mid" in found else "lora"
    return "difference"
