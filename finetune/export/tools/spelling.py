"""Keys of adapter files as other trainers spell them, and what a layer's tensors under them mean.

``finetune.export.keys`` takes a key apart. Here a layer's network is found, and its tensors become the one form that
the toolkit has for them, whoever wrote them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.export import kohya, lycoris_kohya
from finetune.export.keys import Key
from finetune.export.layers import Layer
from finetune.export.lycoris import Change
from finetune.export.origin import mapping
from finetune.family import ExportNames
from finetune.originals import unet

LOW_RANK = {"down", "up", "mid", "alpha", "magnitude", "dora_scale"}
"""Parts of a LoRA's layer."""
_MIDDLES = (
    ("hada_t1", "hada_w1_a", "hada_w1_b"),
    ("hada_t2", "hada_w2_a", "hada_w2_b"),
    ("lokr_t2", "lokr_w2_a", "lokr_w2_b"),
)
_NO_CHANGE = {
    "dora_scale": "DoRA of another method than LoRA",
    "diff_b": "a trained bias",
    "w_norm": "a trained norm",
    "b_norm": "a trained norm",
}
_ORIGINAL = re.compile(r"(input_blocks|middle_block|output_blocks)_")
_DENOISER = {"unet", "transformer", "diffusion_model", "lora_unet", "lora_transformer", "lycoris"}
_PLACES = {  # of a text encoder among those of a model
    "text_encoder": 0,
    "text_encoder_2": 1,
    "text_encoder_3": 2,
    "lora_te": 0,
    "lora_te1": 0,
    "lora_te2": 1,
    "lora_te3": 2,
}
Names = Mapping[str, ExportNames]


def network_of(key: Key, names: Names) -> str:
    """The network of a family that a key is about.

    Raises:
        UserError: the family has none that is called so.
    """
    if key.network == "base_model.model":
        return "text_encoder" if re.match(r"(text_model\.)?encoder\.", key.path) else "denoiser"
    if key.network in _DENOISER:
        return "denoiser"
    for network, called in names.items():
        if key.network in (called.diffusers, called.kohya, f"text_encoders.{called.words}.transformer"):
            return network
    encoders = [network for network in names if network != "denoiser"]
    place = _PLACES.get(key.network, 0 if len(encoders) == 1 and key.layout == "comfyui" else len(encoders))
    if key.network in ("text_encoder_2", "text_encoder_3", "lora_te3") or place >= len(encoders):
        known = sorted({name for called in names.values() for name in (called.diffusers, called.kohya)})
        raise UserError(f"unknown key {key.text!r}; the model's networks are called {', '.join(known)}")
    return encoders[place]


def low_rank(keys: Mapping[str, Key], tensors: Mapping[str, Tensor], names: Names, config: Config) -> list[Layer]:
    """The layers that the keys of one layer in a file mean: several where it is one for several of diffusers'.

    Args:
        keys: part -> key.
        tensors: by key.
        config: what the file says besides.

    Raises:
        UserError: a part is missing, or is none that can be taken over.
    """
    parts = {part: tensors[key.text] for part, key in keys.items()}
    one = next(iter(keys.values()))
    if strange := sorted(parts.keys() - LOW_RANK):
        raise UserError(f"{keys[strange[0]].text!r} cannot be taken over: a low-rank layer has no {strange[0]}")
    network = network_of(one, names)
    for part, other in (("down", "up"), ("up", "down")):
        if part not in parts:
            raise UserError(f"key {keys[other].text if other in keys else one.text!r} lacks its partner, the {part}")
    down, up = parts["down"], parts["up"]
    if "mid" in parts:  # of LoCon's middle factor the first convolution takes the rest over
        down = torch.einsum("ri...,ic->rc...", parts["mid"].float(), down.float().flatten(1)).to(down)
    rank = parts["down"].shape[0]
    if one.layout in ("kohya", "comfyui"):
        stem, called = _stem(one, names[network])
        stated = parts.get("alpha", torch.tensor(float(rank))).reshape(-1)[0]
        given = {kohya.DOWN: down, kohya.UP: up, kohya.ALPHA: stated}
        found = kohya.unpack({stem + part: given[part] for part in given}, {**names, network: called})
    else:
        module = _module(one, names[network])
        alpha = float(parts["alpha"]) if "alpha" in parts else config.alpha(one, rank)
        found = [Layer(network=network, module=module, down=down, up=up, alpha=alpha)]
    lengths = parts.get("magnitude", parts.get("dora_scale"))
    if lengths is None:
        return found
    if len(found) != 1:
        raise UserError(f"{one.text!r}: lengths of layers that are one in a file cannot be told apart")
    return [replace(found[0], magnitude=_lengths(lengths, up, keys))]


def changes(keys: Mapping[str, Key], tensors: Mapping[str, Tensor], names: Names) -> list[Change]:
    """As ``low_rank``, of LoHa, LoKr and whole differences in LyCORIS' layout.

    Raises:
        UserError: a part is missing, or is none that can be taken over.
    """
    one = next(iter(keys.values()))
    network = network_of(one, names)
    stem, called = _stem(one, names[network])
    parts = _without_middle({part: tensors[key.text] for part, key in keys.items()})
    for part, what in _NO_CHANGE.items():
        if part in parts:
            raise UserError(f"{keys[part].text!r} cannot be taken over: it is {what}, which no layer here has")
    held = {f"{stem}.{part}": tensor for part, tensor in parts.items()}
    return lycoris_kohya.unpack(held, {**names, network: called})


def _without_middle(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tucker's decomposition of a convolution as two factors, the second of which takes the middle one over.

    LyCORIS makes ``W[p, r, ...] = sum_ij t[i, j, ...] a[i, p] b[j, r]`` of the middle factor t [rank, rank, k, k] and
    outer ones [rank, out] and [rank, in]; without t they are [out, rank] and [rank, in * k * k].
    """
    for middle, first, second in _MIDDLES:
        if middle in parts and {first, second} <= parts.keys():
            inner = torch.einsum("ij...,jr->ir...", parts[middle].float(), parts[second].float())
            taken = {first: parts[first].T.contiguous(), second: inner.flatten(1).to(parts[second])}
            parts = {part: tensor for part, tensor in parts.items() if part != middle} | taken
    return parts


class Config:
    """What a file says of its scales outside of its tensors: PEFT's settings, in the header or beside the file."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self._settings: dict[str, dict[str, Any]] = {}
        for name, value in mapping(metadata.get("lora_adapter_metadata", "")).items():
            component, _, setting = name.partition(".")
            self._settings.setdefault(component, {})[setting] = value

    @classmethod
    def of_peft(cls, settings: Mapping[str, Any]) -> Config:
        """Of an ``adapter_config.json``."""
        made = cls({})
        made._settings["base_model.model"] = dict(settings)
        return made

    def alpha(self, key: Key, rank: int) -> float:
        """What a layer's change is scaled by before the division by its rank; the rank where nothing is said."""
        said = self._settings.get(key.network, {})
        patterns = said.get("alpha_pattern") or {}
        given = next((patterns[one] for one in patterns if re.fullmatch(rf"(.*\.)?({one})", key.path)), None)
        alpha = given if given is not None else said.get("lora_alpha", rank)
        return float(alpha) * math.sqrt(rank) if said.get("use_rslora") else float(alpha)


def _stem(key: Key, called: ExportNames) -> tuple[str, ExportNames]:
    """What stands before the dot in kohya's layout, and the names under which it is to be read."""
    word = key.word
    if key.layout == "comfyui" and called.missing_level:
        word = called.missing_level.replace(".", "_") + word.removeprefix(called.missing_level.replace(".", "_"))
    if _ORIGINAL.match(word) and not called.places:
        called = replace(called, places=unet.places({}))
    return f"{called.kohya}_{word}", called


def _module(key: Key, called: ExportNames) -> str:
    """A layer's path inside its network."""
    path = re.sub(r"\.to_out$", ".to_out.0", key.path.replace(".processor.", "."))
    return path.removeprefix(called.missing_level)


def _lengths(lengths: Tensor, up: Tensor, keys: Mapping[str, Key]) -> Tensor:
    """DoRA's lengths of the outputs, as the toolkit shapes them."""
    if lengths.numel() != up.shape[0] or (lengths.ndim > 1 and lengths.shape[0] == 1 and up.ndim == 2):
        text = next(keys[part].text for part in ("magnitude", "dora_scale") if part in keys)
        raise UserError(
            f"{text!r} is {list(lengths.shape)}: lengths of inputs, of which PEFT and diffusers have no DoRA; "
            f"expected one for each of {up.shape[0]} outputs"
        )
    return lengths.reshape(-1) if up.ndim == 2 else lengths.reshape(1, -1, 1, 1)
