"""Models that make masks, by name or folder; what one is, its ``config.json`` says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_tools.masking.sam import Sam
from data_tools.masking.text import ClipSeg
from finetune.errors import UserError

SAM = "facebook/sam-vit-base"
CLIPSEG = "CIDAS/clipseg-rd64-refined"
"""What is loaded where nothing is named."""

SAMS = {"sam": "SamModel", "sam2": "Sam2Model", "sam2_video": "Sam2Model"}  # files of SAM 2 say that they are for video


@dataclass(frozen=True)
class Models:
    """What was named."""

    sam: Sam | None = None
    clipseg: ClipSeg | None = None


def load(names: Sequence[str], device: torch.device) -> Models:
    """Load models, at most one of each kind.

    Raises:
        UserError: one cannot be had, is something else, or is a second of its kind.
    """
    found: dict[str, Any] = {}
    for name in names:
        kind = kind_of(name)
        slot = "sam" if kind in SAMS else "clipseg"
        if slot in found:
            raise UserError(f"--model {name}: is a second model of its kind; expected a SAM, a CLIPSeg or one of each")
        found[slot] = _sam(name, kind, device) if slot == "sam" else _clipseg(name, device)
    return Models(**found)


def kind_of(name: str) -> str:
    """The kind of a model, such as "sam2".

    Raises:
        UserError: it cannot be had, or is of a kind that makes no masks.
    """
    from transformers import PretrainedConfig

    with _found(name):
        config, _ = PretrainedConfig.get_config_dict(name, local_files_only=Path(name).exists())
    kind = config.get("model_type")
    if kind is None:
        raise UserError(f"--model {name}: has no config.json that says what it is")
    if kind not in SAMS and kind != "clipseg":
        raise UserError(f"--model {name}: its config.json says {kind!r}; expected sam, sam2 or clipseg")
    return str(kind)


def _sam(name: str, kind: str, device: torch.device) -> Sam:
    import transformers
    from transformers import ImageProcessingMixin

    with _found(name):
        preprocessing, _ = ImageProcessingMixin.get_image_processor_dict(name, local_files_only=Path(name).exists())
        model = getattr(transformers, SAMS[kind]).from_pretrained(name, **_loading(name))
    return Sam(model.to(device), preprocessing)


def _clipseg(name: str, device: torch.device) -> ClipSeg:
    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

    with _found(name):
        processor = CLIPSegProcessor.from_pretrained(name, local_files_only=Path(name).exists())
        model: Any = CLIPSegForImageSegmentation.from_pretrained(name, **_loading(name))
    return ClipSeg(model.to(device), processor)


def _loading(name: str) -> dict[str, Any]:
    return {"local_files_only": Path(name).exists(), "use_safetensors": True, "torch_dtype": torch.float32}


@contextmanager
def _found(name: str) -> Iterator[None]:
    """What transformers raises for a model that is not there or not whole, as a ``UserError``."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        what = "cannot be loaded" if Path(name).exists() else "is no folder here and cannot be fetched"
        raise UserError(f"--model {name}: {what} ({first})") from None
