"""What a single file is, as its keys, shapes and header say it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finetune.errors import UserError
from finetune.families.single_file.layouts import DENOISER, LAYOUTS, SD1, Layout
from finetune.objective import Prediction

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
V_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"
"""Keys of empty tensors by which ComfyUI knows that a model predicts v, and from a first step of pure noise."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.bfloat16,  # which holds every number of these two
    "F8_E5M2": torch.bfloat16,
}
_SCALES = (
    ".scale_weight",
    ".weight_scale",
    "scaled_fp8",
    ".comfy_quant",
)  # keys of what packed numbers are to be multiplied with
_PREDICTIONS: Mapping[str, Prediction] = {
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "epsilon": "epsilon",
    "eps": "epsilon",
}
_ALONE = tuple(one.mark.removeprefix(DENOISER) for one in LAYOUTS if one.mark.startswith(DENOISER))
"""By which a file of nothing but a denoiser is known, whose keys may lack their prefix."""
_REFINER = "conditioner.embedders.0.model."
_OURS = ("down_blocks.", "transformer_blocks.", "text_model.", "encoder.down_blocks.")


class Stored(NamedTuple):
    """A tensor that was not read."""

    key: str
    shape: tuple[int, ...]
    dtype: str  # as the format calls it: "F16"

    @property
    def blank(self) -> Tensor:
        """One like it on the meta device, in the dtype that it is read in."""
        return torch.empty(self.shape, dtype=_DTYPES[self.dtype], device="meta")

    def read(self, file: safe_open) -> Tensor:
        """The tensor; numbers of 8 bits as bfloat16."""
        found: Tensor = file.get_tensor(self.key)
        return found.to(_DTYPES.get(self.dtype, found.dtype))


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

    def holds(self, subfolder: str) -> bool:
        """Whether a network, by its subfolder of a diffusers folder, is in the file."""
        prefix = self.layout.components[subfolder].prefix
        return any(key.startswith(prefix) for key in self.tensors)

    @property
    def lacking(self) -> list[str]:
        """Networks of the layout that the file does not hold, by their subfolders."""
        return [subfolder for subfolder in self.layout.components if not self.holds(subfolder)]

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
    if path.suffix == ".gguf":
        raise UserError(f"model.path: {path} holds packed numbers; take the .safetensors that it was made of")
    with opened(path) as file:
        metadata = dict(file.metadata() or {})
        slices = {key: file.get_slice(key) for key in sorted(file.keys())}
        stored = {key: Stored(key, tuple(one.get_shape()), one.get_dtype()) for key, one in slices.items()}
    alone = DENOISER if any(key.startswith(_ALONE) for key in stored) else ""
    layout = _layout(path, {alone + key for key in stored})
    tensors = {_called(layout, alone + key): one for key, one in stored.items()}
    _require_plain(path, layout, tensors)
    return Checkpoint(path, layout, tensors, metadata)


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


def _called(layout: Layout, key: str) -> str:
    """A key as the layout has it, whatever the tool that wrote it."""
    for other, ours in layout.renamed.items():
        if key.startswith(other):
            key = ours + key.removeprefix(other)
    for component in layout.components.values():
        if component.table is None and key.startswith(component.prefix):
            return component.prefix + component.full(key.removeprefix(component.prefix))
    return key


def _layout(path: Path, keys: Set[str]) -> Layout:
    found = next((one for one in LAYOUTS if any(key.startswith(one.mark) for key in keys)), None)
    if found is None or not any(key.startswith(DENOISER) for key in keys):
        raise UserError(f"{path}: {_stranger(keys)}")
    return found


def _require_plain(path: Path, layout: Layout, tensors: Mapping[str, Stored]) -> None:
    """Refuse models that are asked more than to take noise from latents, and numbers that are not what they say."""
    if any(key.startswith("edm_") for key in tensors):
        raise UserError(f"{path}: says by keys edm_... that its noise is EDM's; that is not read from a single file")
    if layout.first in tensors and (channels := tensors[layout.first].shape[1]) > layout.channels:
        raise UserError(
            f"{path}: the denoiser has {channels} input channels and does not read plain latents; inpainting and "
            "control models cannot be trained"
        )
    if scaled := next((key for key in tensors if key.endswith(_SCALES)), None):
        raise UserError(f"{path}: {scaled!r} says that its numbers are packed; take the file that it was made of")
    for component in layout.components.values():
        for key, one in tensors.items():
            if key.startswith(component.prefix) and one.dtype not in _DTYPES and not one.dtype.startswith("I"):
                raise UserError(f"{path}: {one.key} is {one.dtype}; expected one of {', '.join(_DTYPES)}")


def _stranger(keys: Set[str]) -> str:
    """What a file of no layout may be."""
    if any("lora" in key or "hada_" in key or "lokr_" in key for key in keys):
        return "holds an adapter and no model; model.path names the model that it is for"
    if any(key.startswith(_REFINER) for key in keys):
        return "is SDXL's refiner, which finishes another model's pictures; train the base model"
    known = ", ".join(layout.name for layout in LAYOUTS)
    if SD1.first in keys:
        return f"holds a U-Net and no text encoder; expected a whole model ({known})"
    if any(key.startswith(_OURS) for key in keys):
        return "is one network of a diffusers folder; model.path names the folder that holds model_index.json"
    first = f"its first key is {min(keys)!r}" if keys else "it holds no tensors"
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
