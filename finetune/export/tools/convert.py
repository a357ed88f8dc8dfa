"""An adapter in another layout."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from finetune.errors import UserError, nearest
from finetune.export import embedding, hypernetwork, lycoris_kohya, lycoris_peft
from finetune.export.delta import base_weights
from finetune.export.kinds import kind
from finetune.export.layers import Layer
from finetune.export.lycoris import Change
from finetune.export.metadata import OWN
from finetune.export.read import Identity, identify, locate, read_header
from finetune.export.stream import require_new, writing
from finetune.export.tools.save import common_alpha, number_type, require_adapter_file, save
from finetune.export.tools.source import Source, groups

_WHOLE = {"embedding": ("diffusers", "a1111"), "hypernetwork": ("diffusers", "a1111")}

_SUFFIXES = {
    ("embedding", "diffusers"): (".safetensors",),
    ("embedding", "a1111"): (".safetensors", ".pt"),
    ("hypernetwork", "diffusers"): (".safetensors",),
    ("hypernetwork", "a1111"): (".pt",),
}


def convert(path: Path, out: Path, to: str, *, dtype: str | None = None, base: str | None = None) -> Path:
    """Write an adapter of any trainer in a layout of its kind.

    Numbers stay bit for bit what they were, but for alpha where the layout to be written has none or has one for all
    layers: then the quotient is in ``lora_B``.

    Args:
        path: a LoRA, LoHa, LoKr, new word or hypernetwork, or a folder of PEFT's.
        to: LoRA: "diffusers", "kohya" or "difference". LoHa and LoKr: "kohya" or "peft". Words and hypernetworks:
            "diffusers" or "a1111".
        dtype: of the numbers; as they are where it is not given.
        base: as in a recipe's ``model.path``; what the file says where it is not given.

    Raises:
        UserError: the file is no such adapter, its kind has no such layout, or there is a file already.
    """
    require_new(out)
    whole = _whole(path)
    if whole is not None:
        return _convert_whole(whole, out, _layout(to, _WHOLE[whole.kind], whole.kind))
    require_adapter_file(out)
    source = Source(path, base)
    numbers = number_type(dtype) if dtype else source.dtype
    to = _layout(to, kind(source.kind).LAYOUTS, source.kind)
    if source.kind == "lycoris":
        return write_changes(source, out, to, numbers, list(source))
    if to == "difference":
        return _differences(source, out, numbers)
    alpha = common_alpha(source, numbers)
    blocks = ([source.layer(name) for name in block] for block in groups(list(source)))
    return save(out, to, blocks, source.names, numbers, source.metadata, alpha)


def _layout(to: str, known: Sequence[str], what: str) -> str:
    if to not in known:
        raise UserError(f"there is no layout {to!r} of a {what}{nearest(to, known)}")
    return to


def _whole(path: Path) -> Identity | None:
    """A file that is small and read at once: a new word or a hypernetwork."""
    if path.is_dir() and not any(path.rglob("*.safetensors")):
        return None
    if path.is_dir() and any(path.rglob("adapter_config.json")):
        return None
    found = locate(path)
    if found.is_file() and found.suffix == ".safetensors" and any("." in key for key in read_header(found)[0]):
        said = read_header(found)[1]
        if said.get(f"{OWN}kind") not in _WHOLE and hypernetwork.CONFIG not in said:
            return None
    identity = identify(found)
    return identity if identity.kind in _WHOLE else None


def _convert_whole(found: Identity, out: Path, to: str) -> Path:
    suffixes = _SUFFIXES[found.kind, to]
    if out.suffix not in suffixes:
        said = f"written as {' or '.join(suffixes)}, not {out.suffix or 'without a suffix'}"
        raise UserError(f"{out}: a {found.kind} of layout {to} is {said}")
    metadata = {**found.metadata, f"{OWN}layout": to} if found.metadata else {}
    if found.kind == "hypernetwork":
        hypernetwork.write(out, hypernetwork.read(found.path), metadata)
        return out
    word = embedding.read(found.path)
    if out.suffix == ".pt" and set(word.parts) != {embedding.ALONE}:
        raise UserError(f"{out}: there is no .pt of a word that several text encoders read")
    embedding.write(out, replace(word, metadata=metadata or word.metadata))
    return out


def write_changes(source: Source, out: Path, to: str, dtype: torch.dtype, names: Sequence[str]) -> Path:
    """Some layers of a LoHa or LoKr, or of OFT, which has one layout alone.

    Raises:
        UserError: the layout has no place for them.
    """
    outline = [change for name in names if isinstance(change := source.outline[name], Change)]
    algorithms = sorted({change.algorithm for change in outline})
    if to == "kohya" and "oft" in algorithms:
        raise UserError(f"{source.path}: OFT has no layout but peft: kohya's tools turn outputs, and not inputs")
    header = {**source.metadata, f"{OWN}layout": to, f"{OWN}kind": "lycoris", f"{OWN}layers": str(len(outline))}
    header.pop(lycoris_peft.SETTINGS, None)
    scale = None
    if to == "peft":
        settings = _settings(source, outline, algorithms)
        scale = float(settings["alpha"]) / int(settings["rank"]) if "rank" in settings else None
        header[lycoris_peft.SETTINGS] = lycoris_peft.describe(outline, settings, source.names)
        header = {key: value for key, value in header.items() if not key.startswith("ss_network_")}
    pack = lycoris_peft.pack if to == "peft" else lycoris_kohya.pack
    with writing(out) as writer:
        for block in groups(names):
            found = [source.get(name) for name in block]
            changes = [_scaled(change, scale) for change in found if isinstance(change, Change)]
            writer.add(pack(changes, source.names, dtype))
        writer.metadata |= header
    return out


def _settings(source: Source, outline: Sequence[Change], algorithms: Sequence[str]) -> dict[str, str]:
    """The method's settings, without which PEFT cannot make the layers: from the header, or of LoHa from the shapes."""
    settings: dict[str, str] = json.loads(source.metadata.get(f"{OWN}settings", "{}"))
    if settings.get("algorithm") in algorithms and len(algorithms) == 1:
        return settings
    ranks = {change.rank for change in outline}
    if algorithms == ["loha"] and len(ranks) == 1:
        rank = ranks.pop() or 1
        return {"algorithm": "loha", "rank": str(rank), "alpha": str(outline[0].scale * rank)}
    raise UserError(
        f"{source.path}: PEFT makes {' and '.join(algorithms)} of one setting for all layers, which neither the header "
        "nor the shapes of this file tell"
    )


def _scaled(change: Change, scale: float | None) -> Change:
    """The same change with another scale, whose quotient is in its first factor."""
    if scale is None or change.scale == scale:
        return change
    first = next(part for part in ("hada_w1_a", "lokr_w1", "lokr_w1_a") if part in change.parts)
    folded = change.parts[first].float() * (change.scale / scale)
    return replace(change, parts={**change.parts, first: folded}, scale=scale)


def _differences(source: Source, out: Path, dtype: torch.dtype) -> Path:
    """Of a LoRA the whole change of each layer; DoRA's is that of its base's weights."""
    with writing(out) as writer:
        for block in groups(list(source)):
            layers = [source.layer(name) for name in block]
            changes = [
                Change(network=layer.network, module=layer.module, algorithm="full", parts={"diff": difference})
                for layer, difference in zip(layers, _moved(source, layers), strict=True)
            ]
            writer.add(lycoris_kohya.pack(changes, source.names, dtype))
        header = {**source.metadata, f"{OWN}layout": "difference", f"{OWN}kind": "lora"}
        writer.metadata |= header | {f"{OWN}layers": str(len(source.outline))}
    return out


def _moved(source: Source, layers: Sequence[Layer]) -> Iterator[torch.Tensor]:
    wanted = {f"{layer.name}.weight": layer for layer in layers if layer.magnitude is not None}
    if wanted and source.family is None:
        raise UserError(f"{source.path}: is DoRA, whose difference depends on its base; name it with --base")
    weights = dict(base_weights(source.family.folder, source.names, wanted)) if source.family and wanted else {}
    for layer in layers:
        if layer.magnitude is None:
            yield layer.delta()
        elif f"{layer.name}.weight" in weights:
            weight = weights[f"{layer.name}.weight"].float()
            yield layer.changed(weight) - weight
        else:
            raise UserError(f"{source.path}: the base has no layer {layer.name}")
