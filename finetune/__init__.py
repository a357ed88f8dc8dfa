"""Fine-tuning for diffusion models: LoRA, DreamBooth with prior preservation, full and partial fine-tuning."""

import importlib
import os
from typing import Any

# Their advice is for programmers: transformers misses torchvision at every start, which the toolkit does without on
# purpose, and diffusers asks for an issue whenever a LoRA leaves the text encoder alone.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

__version__ = "0.1.0"

_LAZY = {
    "load_aesthetic": "finetune.export.aesthetic",
    "load_delta": "finetune.export.delta",
    "load_hypernetwork": "finetune.export.hypernetwork",
    "load_lycoris": "finetune.export.kinds.lycoris",
}
"""What users of diffusers call, and where it is: loaded on first use, because it needs torch."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
