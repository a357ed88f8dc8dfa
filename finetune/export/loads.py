"""What becomes of a file in the tools that people draw and train with.

The answers are what their loaders do as their code reads; of these tools diffusers alone is run here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.export.keys import Key

TOOLS = ("diffusers", "comfyui", "forge", "a1111", "kohya")
YES, UNKNOWN = "yes", "not known"
UNETS = ("sd1", "sd2", "sd", "sdxl")
_NO_FLUX = "no: it has no such model"
_ENDS = re.compile(r"(img_in|txt_in|time_in|vector_in|guidance_in|final_layer)(_|$)")


@dataclass(frozen=True)
class Facts:
    """What decides.

    Attributes:
        family: a key of ``finetune.export.guess.FAMILIES``, or None.
        layout: as of ``finetune.export.keys.Key``.
        algorithm: as ``finetune.export.keys.algorithm`` says.
        alphas: the different ones.
        output_axis: of DoRA: whether there is a length for each output.
    """

    keys: Sequence[Key]
    unknown: int
    family: str | None
    layout: str
    algorithm: str
    alphas: Sequence[float]
    output_axis: bool = False


def loads(facts: Facts) -> dict[str, str]:
    """Tool -> "yes", or what goes wrong."""
    found = _by_layout(facts)
    if facts.family and facts.family not in UNETS:
        found["a1111"] = _NO_FLUX if facts.family != "sd3" else "no: it looks for SD3's layers under other names"
    if facts.unknown > 12:
        found["forge"] = f"no: it refuses files with more than 12 unknown keys, here {facts.unknown}"
    if facts.layout == "bundle":
        found |= dict.fromkeys(("comfyui", "forge", "kohya"), "partly: it ignores the words in the file")
        found["diffusers"] = "no: it refuses new words inside a LoRA"
    return {tool: found.get(tool, UNKNOWN) for tool in TOOLS}


def loads_words(family: str | None, layout: str) -> dict[str, str]:
    """The same of files of new words for a key of ``finetune.export.guess.FAMILIES``: A1111 and ComfyUI call a word by
    its file's name, which is the word's in layout a1111 alone.
    """
    others = {"comfyui": YES, "forge": YES, "a1111": YES} if layout == "a1111" else {}
    if family in UNETS or family is None:
        return {"diffusers": YES, "kohya": YES, **others}
    if family in ("flux", "sd3"):
        refused = "no: it takes no word of several encoders but CLIP's"
        return {"diffusers": YES, **others, "forge": refused, "a1111": "no: it has no such model"}
    return {"diffusers": YES}


def _by_layout(facts: Facts) -> dict[str, str]:
    match facts.layout:
        case "kohya" | "bundle":
            return _kohya(facts)
        case "diffusers":
            return _diffusers(facts)
        case "before peft":
            return _before_peft(facts)
        case "comfyui":
            return _comfyui(facts)
    return {"diffusers": "no: it is a PEFT model's, not a pipeline's; load it with PEFT", "kohya": "no"}


def _kohya(facts: Facts) -> dict[str, str]:
    if facts.algorithm == "dora":
        return _dora(facts)
    if facts.algorithm != "lora":
        found = {"comfyui": YES, "forge": YES, "a1111": YES}
        found |= {"kohya": "no: LyCORIS is a module of its own", "diffusers": "no: it has no loader for them"}
        return found | ({"forge": "no: it has no OFT"} if facts.algorithm == "oft" else {})
    if facts.family == "flux":
        found = {"comfyui": YES, "forge": YES, "diffusers": YES, "kohya": YES}
        split = any(key.network == "lora_transformer" for key in facts.keys)
        if any(key.network == "lora_te3" or _ENDS.match(key.word) for key in facts.keys):
            found["diffusers"] = "partly: it loses T5's layers and those outside the blocks"
        return found | ({"kohya": "no: it looks for other names", "forge": UNKNOWN} if split else {})
    if facts.family == "sd3":
        return {"comfyui": YES, "forge": YES, "kohya": YES, "diffusers": "no: it loads nothing and only warns"}
    if facts.family not in UNETS:
        return {}
    found = dict.fromkeys(TOOLS, YES)
    if len(facts.alphas) > 1:
        found["diffusers"] = "wrong: alphas differ, and it gives all attention layers the most frequent one"
    if _incomplete(facts.keys):
        found["diffusers"] = found["a1111"] = "partly: text encoder layers lack siblings, and such sets are dropped"
    if facts.family == "sdxl" and any(key.path == "up_blocks_0_upsamplers_0_conv" for key in facts.keys):
        found["a1111"] = "partly: it loses up_blocks_0_upsamplers_0_conv under this name"
    return found


def _dora(facts: Facts) -> dict[str, str]:
    """With ``dora_scale``."""
    found = {"kohya": "wrong: it ignores dora_scale", "diffusers": "wrong: it drops dora_scale"}
    if facts.output_axis:
        wrong = "wrong: for lengths of outputs it divides by the wrong norm"
        return found | {"comfyui": wrong, "forge": wrong, "a1111": "wrong: it takes them for lengths of inputs"}
    return found | {"comfyui": YES, "forge": YES, "a1111": "yes, from 1.10 on"}


def _diffusers(facts: Facts) -> dict[str, str]:
    if facts.algorithm not in ("lora", "dora"):
        return {tool: "no: it is in PEFT's own layout" for tool in TOOLS}
    found = {"diffusers": YES, "kohya": "no: it loads nothing"}
    if facts.family in UNETS:
        found |= {"comfyui": "partly: it drops attention layers without a word", "a1111": "no: it loads nothing"}
        found |= {"forge": "no: it refuses the file"}
    elif facts.family == "flux":
        found |= {"comfyui": YES, "forge": YES}
    elif facts.family == "sd3":
        found |= {"comfyui": YES, "forge": "no: it refuses the file"}
    if facts.algorithm == "dora":
        found |= {"comfyui": "wrong: it drops the lengths", "forge": "no: it refuses the file"}
        if any(key.text.endswith("lora_magnitude_vector") and "text_encoder" in key.network for key in facts.keys):
            found["diffusers"] = "partly: lengths of text encoders lack .weight and are skipped"
    return found


def _before_peft(facts: Facts) -> dict[str, str]:
    if any(".processor." in key.text for key in facts.keys):
        return {"diffusers": YES, "comfyui": YES, "forge": YES, "a1111": "no: it loads nothing"}
    found = {"comfyui": "partly: it drops attention layers", "forge": "no: it refuses the file"}
    return found | {"diffusers": YES, "a1111": "no: it loads nothing"}


def _comfyui(facts: Facts) -> dict[str, str]:
    text = any(key.network.startswith("text_encoders.") for key in facts.keys)
    found = {"comfyui": YES, "forge": "no: it refuses text encoders under these names" if text else YES}
    found |= {"a1111": "no: it refuses the file", "kohya": "no: it loads nothing"}
    if facts.family in UNETS:
        found["diffusers"] = "no: it refuses the file"
    return found


def _incomplete(keys: Sequence[Key]) -> bool:
    """Whether a CLIP layer has some of its four projections and not all."""
    held: dict[str, set[str]] = {}
    for key in keys:
        if found := re.fullmatch(r"(lora_te\d? .*self_attn)_(q|k|v|out)_proj", key.layer):
            held.setdefault(found[1], set()).add(found[2])
    return any(len(parts) < 4 for parts in held.values())
