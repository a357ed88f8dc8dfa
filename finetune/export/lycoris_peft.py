"""PEFT's own layout of LoKr, LoHa and OFT: ``unet.<module>.lokr_w1``, ``.hada_w1_a``, ``.oft_R.weight``.

The header's ``finetune.peft`` holds the settings of PEFT for each component, without which the numbers mean nothing.
Modules are called as the installed libraries call them. To load it by hand, for each component::

    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[settings["peft_type"]](**settings)
    pipeline.unet.add_adapter(config)
    peft.set_peft_model_state_dict(pipeline.unet, {key without "unet.": tensor})
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import peft
import torch
from torch import Tensor, nn

from finetune.errors import UserError
from finetune.export.lycoris import PARTS, Change
from finetune.export.metadata import OWN
from finetune.family import ExportNames

SETTINGS = f"{OWN}peft"
_CONFIGS = {"LOKR": ("lokr", peft.LoKrConfig), "LOHA": ("loha", peft.LoHaConfig), "OFT": ("oft", peft.OFTConfig)}
_KNOWN = {part for algorithm, _ in _CONFIGS.values() for part in PARTS[algorithm]}


def recognises(keys: Iterable[str]) -> bool:
    """Whether a file with such keys has this layout."""
    return any(_parted(key)[1] in _KNOWN and "." in _parted(key)[0] for key in keys)


def pack(changes: Sequence[Change], names: Mapping[str, ExportNames], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file."""
    return {
        f"{names[change.network].diffusers}.{change.module}.{part}{'.weight' if part == 'oft_R' else ''}": values.to(
            dtype
        )
        for change in changes
        for part, values in change.parts.items()
    }


def describe(changes: Sequence[Change], settings: Mapping[str, str], names: Mapping[str, ExportNames]) -> str:
    """PEFT's settings for each component, JSON, from those of the method."""
    found = {}
    for network in sorted({change.network for change in changes}):
        modules = [change.module for change in changes if change.network == network]
        targets = "|".join(re.escape(module) for module in modules)
        match settings["algorithm"]:
            case "lokr":
                rank, alpha, factor = int(settings["rank"]), float(settings["alpha"]), int(settings["factor"])
                config = peft.LoKrConfig(r=rank, alpha=alpha, decompose_factor=factor, target_modules=targets)
            case "loha":
                rank, alpha = int(settings["rank"]), float(settings["alpha"])
                config = peft.LoHaConfig(r=rank, alpha=alpha, target_modules=targets)
            case _:
                neumann = settings["exact"] == "false"
                size = int(settings["block_size"])
                config = peft.OFTConfig(oft_block_size=size, use_cayley_neumann=neumann, target_modules=targets)
        found[names[network].diffusers] = config.to_dict()
    return json.dumps(found, sort_keys=True)


def unpack(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], names: Mapping[str, ExportNames]
) -> list[Change]:
    """The layers of a file, every key read.

    Raises:
        UserError: a key belongs to no layer, or the header has no settings for it.
    """
    configs, networks = _settings(metadata), {called.diffusers: network for network, called in names.items()}
    found: dict[str, dict[str, Tensor]] = {}
    for key in sorted(tensors):
        name, part = _parted(key)
        component = name.partition(".")[0]
        if component not in networks or component not in configs or part not in _KNOWN:
            expected = f"<{'|'.join(sorted(configs))}>.<module>.<part>"
            raise UserError(f"unknown key {key!r}; expected {expected}, which the header describes")
        found.setdefault(name, {})[part] = tensors[key]
    made = []
    for name, parts in found.items():
        component, _, module = name.partition(".")
        settings = configs[component]
        algorithm = _CONFIGS[settings["peft_type"]][0]
        if strange := parts.keys() - set(PARTS[algorithm]):
            raise UserError(f"{name}: {min(strange)} is no part of {algorithm}, which the header says it is")
        scale = 1.0 if algorithm == "oft" else settings["alpha"] / settings["r"]
        made.append(
            Change(
                network=networks[component],
                module=module,
                algorithm=algorithm,
                parts=parts,
                scale=scale,
                exact=not settings.get("use_cayley_neumann", False),
            )
        )
    return made


def load(pipeline: Any, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], adapter: str) -> list[Any]:
    """Put a file into the networks of a diffusers pipeline, by PEFT. Returns the layers that it made.

    Raises:
        UserError: a layer has no place there, or none of its weights.
    """
    layers = []
    for component, settings in _settings(metadata).items():
        network: nn.Module = getattr(pipeline, component)
        own = {key.removeprefix(f"{component}."): tensors[key] for key in tensors if key.startswith(f"{component}.")}
        config = _CONFIGS[settings["peft_type"]][1](**settings)
        with torch.random.fork_rng(devices=[]):
            peft.inject_adapter_in_model(config, network, adapter_name=adapter)
        outcome = peft.set_peft_model_state_dict(network, own, adapter_name=adapter)
        if outcome.unexpected_keys:
            raise UserError(f"{component} has no place for {min(outcome.unexpected_keys)}")
        network.train(network.training)
        made = [
            part
            for part in network.modules()
            if adapter in getattr(part, "_available_adapters", getattr(part, "oft_R", ()))
        ]
        if len(made) != len({_parted(key)[0] for key in own}):
            raise UserError(f"{component}: {len(own)} tensors were to make layers, {len(made)} were made")
        layers += made
    return layers


def _settings(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT's settings by component.

    Raises:
        UserError: the header holds none, or of a method that is not known here.
    """
    try:
        configs: dict[str, dict[str, Any]] = json.loads(metadata[SETTINGS])
        for settings in configs.values():
            _CONFIGS[settings["peft_type"]]
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"the header says nothing in {SETTINGS} that PEFT could be told") from error
    return configs


def _parted(key: str) -> tuple[str, str]:
    """``unet.<module>`` and the part of its layer."""
    name, _, part = key.removesuffix(".weight").rpartition(".")
    return name, part
