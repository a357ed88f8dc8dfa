"""LoKr, LoHa and OFT: PEFT's own layout with its settings in the header, and for LoKr and LoHa that of kohya's naming.

diffusers' ``load_lora_weights`` reads neither: ``finetune sample`` and the report go through PEFT, or add what a file
of kohya's naming changes to the weights, as ComfyUI and A1111 do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.adapter import Weights
from finetune.config.schema import Recipe
from finetune.errors import GuardError, UserError
from finetune.export import check_lycoris, lycoris_kohya, lycoris_peft
from finetune.export.base import load_base
from finetune.export.checks import Report
from finetune.export.kinds import Contents, asked, wanted
from finetune.export.lycoris import Change, changes, check_learned
from finetune.export.merge import merge
from finetune.export.metadata import OWN, describe, side_file
from finetune.export.names import fuses
from finetune.export.read import Identity, identify, read_tensors
from finetune.family import ExportNames, ModelFamily, writable
from finetune.files import write_json, write_tensors

LAYOUTS = ("peft", "kohya")
ADAPTER = "sampled"


def require_learned(weights: Weights, recipe: Recipe) -> None:
    """One factor, or the rotation, is zero at first."""
    check_learned(changes(weights))


def write(weights: Weights, family: ModelFamily, recipe: Recipe, folder: Path) -> list[Path]:
    """``<run>-peft.safetensors``, and of LoKr and LoHa ``<run>.safetensors`` with its card."""
    found = changes(weights)
    paths = []
    for layout, name in file_names(recipe, weights.settings["algorithm"], family.export_names).items():
        tensors = _pack(layout, found, family, getattr(torch, recipe.export.dtype))
        path = folder / name
        write_file(path, tensors, _header(layout, found, weights, family, recipe))
        if layout == "kohya":
            write_json(path.with_suffix(".json"), side_file(recipe, family))
        paths.append(path)
    return paths


def recognise(contents: Contents) -> str | None:
    """By the parts of the keys."""
    if lycoris_kohya.algorithm_of(contents.keys) in ("loha", "lokr"):
        return "kohya"
    return "peft" if lycoris_peft.recognises(contents.keys) else None


def readers(layout: str) -> tuple[str, ...]:
    """PEFT; of the other layout, those that know LyCORIS."""
    return check_lycoris.READERS[layout]


def check(report: Report, found: Identity, base: str | None, against: Sequence[str], weights: Weights | None) -> None:
    """See ``finetune.export.check_lycoris``."""
    family = load_base(found, base)

    def expected(dtype: torch.dtype) -> tuple[list[Change], dict[str, Tensor]]:
        assert weights is not None
        trained = changes(weights)
        return trained, _pack(found.layout, trained, family, dtype)

    check_lycoris.check_file(report, found, family, against, expected if weights else None, apply)


def apply(pipeline: Any, found: Identity, strength: float) -> None:
    """Through PEFT, or added to the weights.

    Raises:
        UserError: a layer has no place there, or another strength than 1 is asked of a rotation.
    """
    tensors = read_tensors(found.path)
    if found.layout != "peft":
        merge(pipeline, tensors, strength)
        return
    try:
        for layer in lycoris_peft.load(pipeline, tensors, found.metadata, ADAPTER):
            if strength != 1.0:
                if hasattr(layer, "oft_R"):
                    raise UserError(f"{found.path} rotates weights, which has no strength but 1, not {strength:g}")
                layer.set_scale(ADAPTER, strength)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{found.path} does not fit the base: {str(error).splitlines()[0]}") from error


def load_lycoris(pipeline: Any, path: Path | str, strength: float = 1.0) -> None:
    """Let a diffusers pipeline draw with a LoKr, LoHa, OFT or whole differences:
    ``finetune.load_lycoris(pipeline, "star-peft.safetensors")``.

    Raises:
        UserError: it is another file, or does not fit the pipeline.
    """
    found = identify(Path(path))
    if found.kind != "lycoris" and found.layout != "difference":
        raise UserError(f"{path} is no LoKr, LoHa or OFT, but a {found.kind} of layout {found.layout}")
    apply(pipeline, found, strength)


def read(found: Identity, names: Mapping[str, ExportNames]) -> Weights:
    """A file as ``Weights`` under canonical names; where readers do not scale, alpha is the rank.

    Raises:
        UserError: a key is unknown, or the header does not say of which rank the file is.
    """
    tensors, settings = read_tensors(found.path), json.loads(found.metadata.get(f"{OWN}settings", "{}"))
    if found.layout == "peft":
        unpacked = lycoris_peft.unpack(tensors, found.metadata, names)
    else:
        unpacked = lycoris_kohya.unpack(tensors, names)
    if strange := [change for change in unpacked if change.algorithm == "full"]:
        raise UserError(
            f"{found.path}: holds whole differences, as of {strange[0].name}, from which no factors can be had"
        )
    held = {f"{change.name}.{part}": values for change in unpacked for part, values in change.parts.items()}
    if unpacked and unpacked[0].algorithm != "oft":
        if "rank" not in settings:
            raise UserError(f"{found.path}: does not say in its header of which rank it is")
        alphas = {change.name: change.scale * int(settings["rank"]) for change in unpacked}
        held |= {f"{name}.alpha": torch.tensor(alpha) for name, alpha in alphas.items()}
    return Weights("lycoris", held, settings)


def file_names(recipe: Recipe, algorithm: str, names: Mapping[str, ExportNames]) -> dict[str, str]:
    """What the files of a recipe are called, by layout, for a family of these names.

    Where files have several layers as one, LoKr would be as large as the layers: only if it is asked for by name.
    """
    run = Path(recipe.output).absolute().name
    possible = LAYOUTS if algorithm != "oft" else ("peft",)  # OFT of LyCORIS' tools turns outputs, not inputs
    if algorithm == "lokr" and fuses(names) and not asked(recipe, algorithm):
        possible = ("peft",)
    files = {"peft": f"{run}-peft.safetensors", "kohya": f"{run}.safetensors"}
    return {layout: files[layout] for layout in wanted(recipe, algorithm, writable(possible, names))}


def write_file(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file, whole or not at all, and read it back.

    Raises:
        GuardError: it reads back differently.
    """
    write_tensors(path, tensors, metadata)
    back = read_tensors(path)
    if back.keys() != tensors.keys() or not all(torch.equal(back[key], tensors[key]) for key in tensors):
        raise GuardError(f"{path}: reads back differently from what was written")


def _pack(layout: str, found: Sequence[Change], family: ModelFamily, dtype: torch.dtype) -> dict[str, Tensor]:
    return (lycoris_peft if layout == "peft" else lycoris_kohya).pack(found, family.export_names, dtype)


def _header(
    layout: str, found: Sequence[Change], weights: Weights, family: ModelFamily, recipe: Recipe
) -> dict[str, str]:
    settings = weights.settings
    header = describe(layout, (), settings, family, recipe) | {
        f"{OWN}kind": "lycoris",
        f"{OWN}layers": str(len(found)),
        f"{OWN}algorithm": settings["algorithm"],
    }
    if layout == "peft":
        return header | {lycoris_peft.SETTINGS: lycoris_peft.describe(found, settings, family.export_names)}
    return header | {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": settings["rank"],
        "ss_network_alpha": settings["alpha"],
        "ss_network_args": json.dumps({"algo": settings["algorithm"]}),
    }
