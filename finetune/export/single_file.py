"""Whole models as one file in the layout of the original code, which ComfyUI, A1111 and Forge load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from finetune.adapter import Weights
from finetune.errors import UserError
from finetune.export.full import weight_files
from finetune.export.overlay import Overlay
from finetune.export.read import SINGLE
from finetune.families.parts import read_json
from finetune.families.single_file.checkpoint import V_KEY, ZERO_SNR_KEY
from finetune.families.single_file.layouts import Layout, layout_of
from finetune.family import ExportNames
from finetune.files import replacing, stream_tensors
from finetune.originals import Place
from finetune.originals.tensors import fill


class Piece(NamedTuple):
    """A weight of a diffusers folder and its place in the single file."""

    place: Place
    name: str  # canonical, or <component>.<key> of what never trains
    file: safe_open
    key: str

    def blank(self, dtype: torch.dtype) -> Tensor:
        """One like it on the meta device."""
        return torch.empty(self.file.get_slice(self.key).get_shape(), dtype=dtype, device="meta")


def write_single_file(
    weights: Weights,
    base: Path,
    path: Path,
    names: Mapping[str, ExportNames],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    scheduler: Mapping[str, Any],
) -> Path:
    """Write the diffusers folder ``base`` with the trained weights put in as one file, whole or not at all.

    One tensor is in memory at a time, beside pages of the base's files, which the system takes back when it needs them.

    Args:
        names: of the family's networks.
        dtype: of all tensors.
        scheduler: settings of the model's scheduler. The file says of them what readers look for: that it predicts v,
            and from a first step of pure noise.

    Raises:
        GuardError: a trained tensor is empty, not finite or has no place of its shape in the base, or none differs
            from the base.
        UserError: the base is of no architecture that has such files, or a component of it has no safetensors.
    """
    overlay = Overlay(weights, dtype)
    marks = [V_KEY] if scheduler.get("prediction_type") == "v_prediction" else []
    marks += [ZERO_SNR_KEY] if scheduler.get("rescale_betas_zero_snr") else []
    with ExitStack() as stack, replacing(path) as temporary:
        held = pieces(base, names, stack)
        places = {key: [piece.place for piece in found] for key, found in held.items()}
        blanks = {key: fill(places[key], [piece.blank(dtype) for piece in found]) for key, found in held.items()}

        def read(key: str) -> Tensor:
            if key in marks:
                return torch.zeros(0)
            parts = [overlay.over(piece.name, piece.file.get_tensor(piece.key)) for piece in held[key]]
            return fill(places[key], parts)

        stream_tensors(temporary, blanks | {mark: torch.zeros(0) for mark in marks}, read, metadata)
        overlay.finish(base)
    return path


def pieces(base: Path, names: Mapping[str, ExportNames], stack: ExitStack) -> dict[str, list[Piece]]:
    """Of which weights of a diffusers folder each tensor of a single file is made. The files are open in ``stack``.

    Raises:
        UserError: the folder is of no architecture that has such files.
    """
    layout = required_layout(base)
    networks = {called.diffusers: network for network, called in names.items()}
    held: dict[str, list[Piece]] = {}
    for subfolder in layout.components:
        if not (base / subfolder).is_dir():
            continue  # a model of this architecture may do without: SD 3 without T5
        settings = read_json(base / subfolder / "config.json")
        network = networks.get(subfolder)
        level = names[network].missing_level if network else ""
        for file in weight_files(base / subfolder):
            opened = stack.enter_context(safe_open(file, framework="pt"))
            for key, place in layout.places(subfolder, _weights(opened), settings).items():
                canonical = f"{network or subfolder}.{key.removeprefix(level)}"
                held.setdefault(place.path, []).append(Piece(place, canonical, opened, key))
        component = layout.components[subfolder]
        for both in component.copies.items():
            keys = [component.prefix + name for name in both]
            held |= {key: held[stored] for stored in keys if stored in held for key in keys}
    return held


def required_layout(base: Path) -> Layout:
    """The layout of a diffusers folder's single file.

    Raises:
        UserError: there is none.
    """
    if (found := layout_of(base)) is None:
        raise UserError(f"export.formats: {base} is of no architecture that is written as {SINGLE}")
    return found


def _weights(file: safe_open) -> Iterator[str]:
    """Keys of weights. Older text encoders list their positions among them."""
    yield from (key for key in sorted(file.keys()) if not key.endswith("position_ids"))
