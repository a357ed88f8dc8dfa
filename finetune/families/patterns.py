"""Patterns of layers and parameters: those of CLIP text encoders, and how they stand beside a denoiser's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

Patterns = Mapping[str, Mapping[str, Sequence[str]]]
"""Preset -> network -> regular expressions, as in ``finetune.family.Sites``."""

NORMS = [r"norm\w*\.weight$", r"bias$"]
_ATTENTION = [r".*\.self_attn\.(q|k|v|out)_proj"]
_WIDE = [*_ATTENTION, r".*\.mlp\.fc[12]"]
_LAYERS = [r"(^|\.)encoder\.", r"(^|\.)final_layer_norm\."]


def linears(denoiser: Mapping[str, Sequence[str]], clips: Iterable[str], wide: Sequence[str]) -> Patterns:
    """``Sites.linears``: attention in the ``clips``, and in presets that are ``wide`` all that is linear."""
    return {
        preset: {"denoiser": found, **dict.fromkeys(clips, _WIDE if preset in wide else _ATTENTION)}
        for preset, found in denoiser.items()
    }


def selections(denoiser: Mapping[str, Sequence[str]], clips: Iterable[str]) -> Patterns:
    """``Sites.selections``: the ``clips``' layers, or what a preset of the same name means there."""
    same = {"all": [""], "norm-bias": NORMS}
    return {
        preset: {"denoiser": found, **dict.fromkeys(clips, same.get(preset, _LAYERS))}
        for preset, found in denoiser.items()
    }
