"""Files of hypernetworks: A1111's ``.pt``, which ComfyUI reads too, and the same as safetensors, which loses nothing.

Both hold one pair of networks for each width and the settings that A1111 keeps beside them. In a ``.pt`` a width is an
integer key with a tuple of two state dictionaries; in a safetensors file ``768.k.linear.0.weight`` is a tensor and the
settings are JSON in the header. A ``.pt`` is written as both tools draw with it: without dropout.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.config.tools import COMFYUI
from finetune.errors import UserError
from finetune.export.pickles import write_pickle
from finetune.export.read import read_header, read_pickle, read_tensors
from finetune.files import write_tensors
from finetune.hypernet import ACTIVATIONS, ROLES, Hypernetwork, Structure, attach

FORMAT, CONFIG = "hypernetwork.format", "hypernetwork.config"
INITS = {
    "normal": "Normal",
    "xavier_uniform": "XavierUniform",
    "xavier_normal": "XavierNormal",
    "kaiming_uniform": "KaimingUniform",
    "kaiming_normal": "KaimingNormal",
}
"""Our name of an initialisation -> A1111's."""
_STRUCTURAL = {
    *("layer_structure", "activation_func", "activate_output", "is_layer_norm"),
    *("use_dropout", "dropout_structure", "last_layer_dropout"),
}
_OLD = {"linear1": "linear.0", "linear2": "linear.1"}


@dataclass(frozen=True)
class Stored:
    """A hypernetwork at rest.

    Attributes:
        structure: of each of its networks.
        tensors: ``<width>.<k or v>.linear.<place>.<weight or bias>``, sorted as A1111's modules are.
        facts: what else A1111 keeps: step, name, weight_initialization, sd_checkpoint_name, ...
    """

    structure: Structure
    tensors: dict[str, Tensor]
    facts: Mapping[str, Any]

    def network(self) -> Hypernetwork:
        """As a module in ``eval()``, in float32.

        Raises:
            UserError: the tensors are not those of the structure.
        """
        network = Hypernetwork(self.structure, {_place(name)[0] for name in self.tensors})
        network.load(self.tensors)
        return network.eval().requires_grad_(False)

    def settings(self) -> dict[str, Any]:
        """A1111's entries beside the networks, plain Python values."""
        one = self.structure
        dropout = list(one.dropout) or [0.0] * len(one.layers)
        return {
            "step": 0,
            "name": "",
            "weight_initialization": "Normal",
            "sd_checkpoint": None,
            "sd_checkpoint_name": None,
            "optional_info": None,
            **self.facts,
            "layer_structure": [int(share) if share == int(share) else share for share in one.layers],
            "activation_func": one.activation,
            "activate_output": one.activate_output,
            "is_layer_norm": one.layer_norm,
            "use_dropout": any(dropout),
            "dropout_structure": dropout,
            "last_layer_dropout": len(dropout) > 2 and dropout[-2] > 0,
        }

    def without_dropout(self) -> Stored:
        """What it computes in ``eval()``: no dropout, and the places counted without it."""
        if not any(self.structure.dropout):
            return replace(self, structure=self.structure.without_dropout())
        places, tensors = self.structure.renumbered(), {}
        for name, tensor in self.tensors.items():
            width, role, place, what = _place(name)
            tensors[f"{width}.{role}.linear.{places[place]}.{what}"] = tensor
        return Stored(self.structure.without_dropout(), tensors, self.facts)


def load_hypernetwork(pipe: Any, file: str | Path, strength: float = 1.0) -> Hypernetwork:
    """Let a diffusers pipeline draw with a hypernetwork; those loaded before it stay, and act before it.

        hypernetwork = finetune.load_hypernetwork(pipe, "fep.pt", strength=0.8)
        pipe("a red star on grass in the style of fep").images[0]
        hypernetwork.multiplier = 0.0  # the pipeline as it was

    Args:
        pipe: any pipeline with a U-Net.
        file: A1111's ``.pt``, which is read without running anything in it, or our safetensors.
        strength: how much it counts; 1 is what was trained.

    Raises:
        UserError: it is no hypernetwork, or one for a model of other widths; the pipeline has no U-Net, or a fused one.
    """
    denoiser = getattr(pipe, "unet", None)
    if denoiser is None:
        raise UserError(f"{type(pipe).__name__} has no U-Net; hypernetworks change the key and value layers of one")
    try:
        network = read(Path(file)).network().to(denoiser.device)
        attach(denoiser, network)
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(str(file)) else f"{file}: {error}") from error
    network.multiplier = strength
    return network


def convert(source: Path, target: Path) -> None:
    """Write a hypernetwork in the layout that the suffix of ``target`` names, ``.pt`` or ``.safetensors``.

    Values, dtypes and settings stay; a ``.pt`` has no dropout.

    Raises:
        UserError: ``source`` is no hypernetwork, or a suffix is another.
    """
    write(target, read(source))


def write(path: Path, stored: Stored, metadata: Mapping[str, str] | None = None) -> None:
    """Write a file of the layout that the suffix names, whole or not at all.

    Args:
        metadata: more of a safetensors file's header.
    """
    if path.suffix == ".pt":
        write_pickle(path, pickled(stored.without_dropout()))
    elif path.suffix == ".safetensors":
        header = {FORMAT: "a1111", CONFIG: json.dumps(stored.settings(), sort_keys=True)}
        write_tensors(path, stored.tensors, header | dict(metadata or {}))
    else:
        raise UserError(f"{path}: hypernetworks are written as .pt or .safetensors, not {path.suffix or 'without one'}")


def pickled(stored: Stored) -> dict[Any, Any]:
    """What is in A1111's ``.pt``: widths ascending, weights before biases, for ComfyUI goes by the order."""
    content: dict[Any, Any] = {}
    for name in sorted(stored.tensors, key=_order):
        width, role, place, what = _place(name)
        pair = content.setdefault(width, tuple(OrderedDict() for _ in ROLES))
        pair[ROLES.index(role)][f"linear.{place}.{what}"] = stored.tensors[name]
    return content | stored.settings()


def read(path: Path) -> Stored:
    """A hypernetwork's file, of either layout, in the dtype of the file.

    Raises:
        UserError: it is damaged or something else.
    """
    try:
        if path.suffix == ".pt":
            return unpickled(read_pickle(path))
        config = read_header(path)[1].get(CONFIG)
        if config is None:
            raise UserError("is no hypernetwork: its header has no hypernetwork.config")
        settings = json.loads(config)
        return Stored(structure_of(settings), _checked(read_tensors(path)), _facts(settings))
    except (UserError, json.JSONDecodeError) as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def unpickled(content: Any) -> Stored:
    """The reverse of ``pickled``, for files of all ages.

    Raises:
        UserError: it is something else.
    """
    entries = content if isinstance(content, dict) else {}
    tensors: dict[str, Tensor] = {}
    for width in sorted(key for key in entries if isinstance(key, int)):
        pair = entries[width]
        if not isinstance(pair, tuple | list) or not all(isinstance(part, dict) for part in pair) or len(pair) != 2:
            raise UserError(f"the entry {width} is no pair of networks")
        for role, part in zip(ROLES, pair, strict=True):
            for name, tensor in part.items():
                tensors[f"{width}.{role}.{_renamed(str(name))}"] = tensor
    settings = {key: value for key, value in entries.items() if isinstance(key, str)}
    return Stored(structure_of(settings), _checked(tensors), _facts(settings))


def structure_of(settings: Mapping[str, Any]) -> Structure:
    """From A1111's settings; what old files lack is what A1111 takes it for, ``activate_output`` included.

    Raises:
        UserError: the settings contradict each other or mean nothing.
    """
    layers = settings.get("layer_structure") or [1, 2, 1]
    dropout = settings.get("dropout_structure")
    if not settings.get("use_dropout", False):
        dropout = []
    elif not dropout:  # the rule before dropout had a structure
        last = 0.3 if settings.get("last_layer_dropout", False) else 0.0
        dropout = [0.0, *[0.3] * (len(layers) - 3), last, 0.0] if len(layers) > 2 else []
    try:
        structure = Structure(
            layers=tuple(layers),
            activation=(settings.get("activation_func") or "linear").lower(),
            activate_output=bool(settings.get("activate_output", True)),
            layer_norm=bool(settings.get("is_layer_norm", False)),
            dropout=tuple(dropout) if any(dropout) else (),
        )
    except (TypeError, AttributeError) as error:
        raise UserError(f"the settings are no hypernetwork's: {error}") from error
    return structure


def comfyui_objection(structure: Structure) -> str | None:
    """Why ComfyUI would not draw with it as A1111 does; None where it would."""
    if structure.activation not in COMFYUI:
        return f"it knows no activation {structure.activation!r} and would leave the model as it is"
    normed = structure.layer_norm and ACTIVATIONS[structure.activation] is not None
    if normed and not structure.activate_output:
        return "it puts an activation before the last layer norm unless activate_output is true"
    return None


def _facts(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in _STRUCTURAL}


def _checked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        _place(name)
        if not isinstance(tensor, Tensor):
            raise UserError(f"{name} is no tensor")
    if not tensors:
        raise UserError("is no hypernetwork: it holds no networks")
    return {name: tensors[name] for name in sorted(tensors, key=_order)}


def _renamed(name: str) -> str:
    """Old files call two layers ``linear1`` and ``linear2``."""
    first, _, rest = name.partition(".")
    return f"{_OLD[first]}.{rest}" if first in _OLD else name


def _place(name: str) -> tuple[int, str, int, str]:
    """Width, role, place and whether weight or bias."""
    match name.split("."):
        case [width, role, "linear", place, ("weight" | "bias") as what] if (
            role in ROLES and width.isdigit() and place.isdigit()
        ):
            return int(width), role, int(place), what
    raise UserError(f"{name!r} is no tensor of a hypernetwork; expected '768.k.linear.0.weight'")


def _order(name: str) -> tuple[int, str, int, bool]:
    width, role, place, what = _place(name)
    return width, role, place, what == "bias"
