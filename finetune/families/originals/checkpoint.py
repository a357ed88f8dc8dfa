"""What a single file is, as its keys, shapes and header say it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finetune.errors import UserError
from finetune.families.originals.layouts import LAYOUTS, Layout
from finetune.objective import Prediction

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
V_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"
"""Keys of empty tensors by which ComfyUI knows that a model predicts v, and from a first step of pure noise."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PREDICTIONS: Mapping[str, Prediction] = {
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "epsilon": "epsilon",
    "eps": "epsilon",
}
_FIRST = "model.diffusion_model.input_blocks.0.0.weight"
_REFINER = "conditioner.embedders.0.model."
_LEVELLESS = re.compile(r"\.transformer\.(?=(embeddings|encoder|final_layer_norm)\.)")


class Stored(NamedTuple):
    """A tensor that was not read."""

    key: str
    shape: tuple[int, ...]
    dtype: str  # as the format calls it: "F16"

    @property
    def blank(self) -> Tensor:
        """One like it on the meta device."""
        return torch.empty(self.shape, dtype=_DTYPES[self.dtype], device="meta")


@dataclass(frozen=True)
class Checkpoint:
    """A single file of a known layout.

    Attributes:
        tensors: by the keys that the layout names, whatever the file leaves out of them.
        metadata: of the header.
    """

    path: Path
    layout: Layout
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]

    @property
    def prediction(self) -> Prediction | None:
        """What the file says that its denoiser answers; None where it says nothing.

        By ComfyUI's key, by the header's ``modelspec.prediction_type`` or, as ComfyUI writes it, ``predict_key``, or by
        a file of settings beside it with the same name, as A1111 asks for of SD 2.
        """
        if V_KEY in self.tensors:
            return "v_prediction"
        for field in ("modelspec.prediction_type", "modelspec.predict_key"):
            if (said := self.metadata.get(field, "").lower()) in _PREDICTIONS:
                return _PREDICTIONS[said]
        return _beside(self.path.with_suffix(".yaml"))

    @property
    def dtype(self) -> torch.dtype:
        """Of its tensors; float32 where they have several."""
        found = {_DTYPES[one.dtype] for one in self.tensors.values() if one.dtype in _DTYPES and 0 not in one.shape}
        return found.pop() if len(found) == 1 else torch.float32

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the first step of drawing is from pure noise."""
        return ZERO_SNR_KEY in self.tensors


def read_checkpoint(path: Path) -> Checkpoint:
    """Recognise a file; none of its tensors is read.

    Raises:
        UserError: it is a pickle, damaged, an adapter, of an architecture that is not known or cannot be trained.
    """
    if path.suffix in PICKLES:
        raise UserError(
            f"model.path: {path} is a pickle, which can run any code when it is opened, and is not read; take the "
            "author's .safetensors, or convert it with a tool and on a machine that you trust"
        )
    with opened(path) as file:
        metadata = dict(file.metadata() or {})
        slices = {key: file.get_slice(key) for key in sorted(file.keys())}
        stored = {key: Stored(key, tuple(one.get_shape()), one.get_dtype()) for key, one in slices.items()}
    tensors = {_LEVELLESS.sub(".transformer.text_model.", key): one for key, one in stored.items()}
    return Checkpoint(path, _layout(path, tensors), tensors, metadata)


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file, for reading.

    Raises:
        UserError: it is damaged or something else.
    """
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: no whole safetensors file ({path.stat().st_size} bytes): {error}") from error
    with file as within:
        yield within


def _layout(path: Path, tensors: Mapping[str, Stored]) -> Layout:
    found = next((one for one in LAYOUTS if any(key.startswith(one.mark) for key in tensors)), None)
    if found is None:
        raise UserError(f"{path}: {_stranger(tensors)}")
    for subfolder, component in found.components.items():
        if not any(key.startswith(component.prefix) for key in tensors):
            raise UserError(f"{path}: is of {found.name}, but holds no {subfolder}: no key begins {component.prefix!r}")
    if any(key.startswith("edm_") for key in tensors):
        raise UserError(f"{path}: says by keys edm_... that its noise is EDM's; that is not read from a single file")
    if _FIRST in tensors and (channels := tensors[_FIRST].shape[1]) != 4:
        raise UserError(
            f"{path}: the U-Net has {channels} input channels and does not read plain latents; inpainting models "
            "cannot be trained"
        )
    for component in found.components.values():
        for key, one in tensors.items():
            if key.startswith(component.prefix) and one.dtype not in _DTYPES and not one.dtype.startswith("I"):
                raise UserError(f"{path}: {one.key} is {one.dtype}; expected one of {', '.join(_DTYPES)}")
    return found


def _stranger(tensors: Mapping[str, Stored]) -> str:
    """What a file of no layout may be."""
    if any("lora" in key or "hada_" in key or "lokr_" in key for key in tensors):
        return "holds an adapter and no model; model.path names the model that it is for"
    if any(key.startswith(_REFINER) for key in tensors):
        return "is SDXL's refiner, which finishes another model's pictures; train the base model"
    known = ", ".join(layout.name for layout in LAYOUTS)
    if _FIRST in tensors:
        return f"holds a U-Net and no text encoder; expected a whole model ({known})"
    first = f"its first key is {min(tensors)!r}" if tensors else "it holds no tensors"
    return f"is no single file of a model that is known ({known}); {first}"


def _beside(settings: Path) -> Prediction | None:
    """What the original code's settings say; None where there are none, or the file is about something else."""
    try:
        said = yaml.safe_load(settings.read_text(encoding="utf-8"))["model"]["params"].get("parameterization", "eps")
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        return None
    if said not in _PREDICTIONS:
        raise UserError(f"{settings}: model.params.parameterization is {said!r}; expected v or eps")
    return _PREDICTIONS[said]
