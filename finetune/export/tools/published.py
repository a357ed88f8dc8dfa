"""What the networks of published models are called, for files whose base model is not at hand."""

from __future__ import annotations

from collections.abc import Mapping

from finetune.families.single_file.layouts import SDXL
from finetune.families.single_file.published import documents
from finetune.family import ExportNames
from finetune.originals import flux, unet

_LEVEL = "text_model."
_SDXL = documents(SDXL, "epsilon")["unet/config.json"]
_SD = {
    "denoiser": ExportNames("unet", "lora_unet"),
    "text_encoder": ExportNames("text_encoder", "lora_te", _LEVEL),
}

PUBLISHED: Mapping[str, Mapping[str, ExportNames]] = {
    "sd1": _SD,
    "sd2": _SD,
    "sd": _SD,
    "sdxl": {
        "denoiser": ExportNames("unet", "lora_unet", places=unet.places(_SDXL)),
        "text_encoder": ExportNames("text_encoder", "lora_te1", _LEVEL, "clip_l"),
        "text_encoder_2": ExportNames("text_encoder_2", "lora_te2", _LEVEL, "clip_g"),
    },
    "flux": {
        "denoiser": ExportNames("transformer", "lora_unet", places=flux.places({})),
        "text_encoder": ExportNames("text_encoder", "lora_te1", _LEVEL, "clip_l"),
        "text_encoder_2": ExportNames("text_encoder_2", "lora_te3", words="t5xxl"),
    },
}
"""Keys of ``finetune.export.guess.FAMILIES`` -> names of networks. What a table of places has more than a variant of a
model does no harm: it is asked for what files hold.
"""
