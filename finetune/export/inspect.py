"""What an adapter file is, whoever wrote it. Needs no base model, and opens no pickle but those of A1111's kinds."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from finetune.export import guess
from finetune.export.cover import THUMBNAIL
from finetune.export.hypernetwork import comfyui_objection
from finetune.export.hypernetwork import read as read_hypernetwork
from finetune.export.keys import Key, algorithm, parse
from finetune.export.kinds import kind
from finetune.export.loads import UNETS, Facts, loads, loads_words
from finetune.export.metadata import OWN
from finetune.export.origin import base, made_by, mapping, triggers
from finetune.export.read import SINGLE, Identity, identify, locate, read_header
from finetune.export.sizes import Block
from finetune.export.sizes import blocks as sizes

_NAMED = {  # kinds whose files are told by more than their keys
    "embedding": "new word",
    "hypernetwork": "hypernetwork",
    "aesthetic": "aesthetic embedding",
    "full": "whole weights",
}


_KINDS = {
    "lora": "LoRA",
    "dora": "DoRA",
    "tucker": "LoCon with a middle factor",
    "loha": "LoHa",
    "lokr": "LoKr",
    "oft": "OFT",
    "difference": "whole differences",
}


@dataclass(frozen=True)
class Inspection:
    """What can be said of a file.

    Attributes:
        kind: "LoRA", "DoRA", "LoHa", "new word" ...
        layout: how its keys are written: "kohya", "diffusers", "before peft", "comfyui", "peft", "bundle".
        names: whose names the layers of a denoiser have: "diffusers" or "original".
        made_by: the tool, where the header or the keys tell.
        family: what it is for, in words: from names and shapes, else as the header says.
        base: what the header says it was trained on.
        layers: network -> how many layers of it.
        ranks, alphas: value -> how many layers have it.
        dtypes: type of numbers -> how many tensors.
        triggers: words that call what was learned.
        blocks: how large the change is, block by block.
        loads: tool -> "yes", "not known", or what goes wrong there.
        unknown: keys that say nothing that is known.
        notes: what else is worth knowing.
    """

    path: str
    kind: str
    layout: str
    names: str | None = None
    made_by: str | None = None
    family: str | None = None
    base: str | None = None
    layers: Mapping[str, int] = field(default_factory=dict)
    ranks: Mapping[int, int] = field(default_factory=dict)
    alphas: Mapping[float, int] = field(default_factory=dict)
    dtypes: Mapping[str, int] = field(default_factory=dict)
    triggers: Sequence[str] = ()
    blocks: Sequence[Block] = ()
    loads: Mapping[str, str] = field(default_factory=dict)
    unknown: Sequence[str] = ()
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def inspect(path: Path, family: str | None = None) -> Inspection:
    """Say what an adapter is.

    Args:
        path: a file of any trainer, a diffusers folder, or a run's folder.
        family: a key of ``finetune.export.guess.FAMILIES``, where it is known what the file is for.

    Raises:
        UserError: there is no such file, it is damaged, or no adapter of a kind that is known.
    """
    path = locate(path)
    if path.is_dir() or path.suffix != ".safetensors":
        return _named(path, family)
    texts, metadata = read_header(path)
    parsed = {text: parse(text) for text in texts}
    keys = [key for key in parsed.values() if key is not None]
    if not any(key.part not in ("alpha", "bias", "word") for key in keys):
        return _named(path, family)
    return _layers(path, keys, [text for text, key in parsed.items() if key is None], metadata, family)


def _named(path: Path, family: str | None) -> Inspection:
    """A file or folder of a kind that ``identify`` knows."""
    found = identify(path)
    dtypes, notes = {}, []
    if path.is_file() and path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            dtypes = dict(Counter(one.get_dtype() for one in shapes.values()))
            notes = [f"{key}: {list(one.get_shape())}" for key, one in list(shapes.items())[:12]]
    elif path.is_dir():
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
        notes = [f"a {index.get('_class_name')} of {', '.join(sorted(key for key in index if key[0] != '_'))}"]
    return Inspection(
        path=str(path),
        kind=_NAMED.get(found.kind, found.kind),
        layout=found.layout,
        made_by=made_by(found.metadata, ()),
        base=base(found.metadata),
        dtypes=dtypes,
        triggers=triggers(path, found.metadata),
        loads=_named_loads(found, family or guess.called(found.metadata.get(f"{OWN}family", ""))),
        notes=[*notes, *_carried(found.metadata)],
    )


def _named_loads(found: Identity, family: str | None) -> dict[str, str]:
    if found.kind == "embedding":
        return loads_words(family, found.layout)
    answers = dict.fromkeys(kind(found.kind).readers(found.layout), "yes")
    if found.whole and family in UNETS:
        answers |= {"kohya": "yes", **({"a1111": "yes"} if found.layout == SINGLE else {})}
    if found.kind == "hypernetwork" and found.layout == "a1111":
        why = comfyui_objection(read_hypernetwork(found.path).structure)
        answers |= {"comfyui": f"wrong: {why}" if why else "yes", "forge": "no: it draws with no hypernetworks"}
    return answers


def _layers(
    path: Path, keys: Sequence[Key], unknown: Sequence[str], metadata: Mapping[str, str], family: str | None
) -> Inspection:
    layers: dict[str, dict[str, Key]] = {}
    for key in keys:
        if key.part != "word":
            layers.setdefault(key.layer, {})[key.part] = key
    with safe_open(path, framework="pt") as file:
        slices = {key.text: file.get_slice(key.text) for key in keys}
        shapes = {text: one.get_shape() for text, one in slices.items()}
        dtypes = Counter(one.get_dtype() for one in slices.values())
        alphas = Counter(_scalar(file, parts["alpha"]) for parts in layers.values() if "alpha" in parts)
        blocks = sizes(file, layers)
    algorithms = Counter(algorithm(parts) for parts in layers.values())
    ranks = Counter(rank for parts in layers.values() if (rank := _rank(parts, shapes)) is not None)
    layouts = Counter(key.layout for key in keys)
    layout = "bundle" if "bundle" in layouts else layouts.most_common(1)[0][0]
    family = family or guess.family(keys, shapes) or _told(metadata)
    lengths = [shapes[parts["dora_scale"].text] for parts in layers.values() if "dora_scale" in parts]
    facts = Facts(
        keys=keys,
        unknown=len(unknown),
        family=family,
        layout=layout,
        algorithm=algorithms.most_common(1)[0][0],
        alphas=sorted(alphas),
        output_axis=any(shape[0] > 1 for shape in lengths),
    )
    return Inspection(
        path=str(path),
        kind=" + ".join(_KINDS[name] for name in sorted(algorithms)),
        layout=layout,
        names=_names(keys),
        made_by=made_by(metadata, keys),
        family=guess.FAMILIES.get(family, family) if family else None,
        base=base(metadata),
        layers=dict(Counter(name.split(" ")[0] for name in layers)),
        ranks=dict(sorted(ranks.items())),
        alphas=dict(sorted(alphas.items())),
        dtypes=dict(dtypes),
        triggers=triggers(path, metadata),
        blocks=blocks,
        loads=loads(facts),
        unknown=unknown,
        notes=list(_notes(layers, keys, metadata)),
    )


def _told(metadata: Mapping[str, str]) -> str | None:
    """The family that a header of this toolkit names, where layers of unusual sizes do not tell it."""
    said = metadata.get(f"{OWN}family", "")
    return said if said in guess.FAMILIES else None


def _scalar(file: Any, key: Key) -> float:
    return float(file.get_tensor(key.text).flatten()[0])


def _rank(parts: Mapping[str, Key], shapes: Mapping[str, Sequence[int]]) -> int | None:
    for part, axis in (("down", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
        if part in parts:
            return int(shapes[parts[part].text][axis])
    return None


def _names(keys: Sequence[Key]) -> str | None:
    """Whose names the denoiser's layers have."""
    blocks = {
        "original": r"(input_blocks|middle_block|output_blocks|joint_blocks|double_blocks|single_blocks)_",
        "diffusers": r"(down_blocks|mid_block|up_blocks|(single_)?transformer_blocks)_",
    }
    return next((whose for whose, names in blocks.items() if any(re.match(names, key.word) for key in keys)), None)


def _notes(layers: Mapping[str, Mapping[str, Key]], keys: Sequence[Key], metadata: Mapping[str, str]) -> Iterator[str]:
    halves = [name for name, parts in layers.items() if ("down" in parts) != ("up" in parts)]
    if halves:
        yield f"{len(halves)} layers have one factor without the other, for example {min(halves)}"
    words = {key.text.split(".")[1] for key in keys if key.layout == "bundle"}
    if words:
        yield f"holds the new words {', '.join(sorted(words))}"
    if not any("alpha" in parts for parts in layers.values()) and any("down" in parts for parts in layers.values()):
        yield "states no alpha: readers take the scale 1"
    yield from _carried(metadata)
    if told := mapping(metadata.get("ss_network_args", "")).get("algo"):
        yield f"trained with LyCORIS' algo {told}"


def _carried(metadata: Mapping[str, str]) -> Iterator[str]:
    """What else a header holds."""
    if THUMBNAIL in metadata:
        yield "carries a picture"
    if f"{OWN}lock" in metadata:
        yield "carries the recipe that it was trained by"


def _lines(found: Inspection) -> Iterator[str]:
    names = f", {found.names} names" if found.names else ""
    yield found.path
    yield f"  {found.kind}, layout {found.layout}{names}"
    rows = {
        "for": found.family or ("not told by its layers" if found.layers else None),
        "base": found.base,
        "made by": found.made_by,
        "triggers": ", ".join(found.triggers),
        "layers": ", ".join(f"{network} {count}" for network, count in found.layers.items()),
        "rank": _counted(found.ranks),
        "alpha": _counted(found.alphas),
        "numbers": _counted(found.dtypes),
    }
    yield from (f"  {name:<9} {said}" for name, said in rows.items() if said)
    if found.loads:
        yield "  loads in"
        yield from (f"    {tool:<9} {said}" for tool, said in found.loads.items())
    if found.blocks:
        width = max(len(block.name) for block in found.blocks)
        yield "  size of the change"
        yield from (f"    {block.name:<{width}}  {block.norm:9.4f}  {block.layers} layers" for block in found.blocks)
    if found.unknown:
        yield f"  {len(found.unknown)} keys say nothing that is known, for example {found.unknown[0]}"
    yield from (f"  note: {note}" for note in found.notes)


def _counted(values: Mapping[Any, int]) -> str:
    """Values, with how often each is there where they differ."""
    said = {f"{value:g}" if isinstance(value, float) else str(value): count for value, count in values.items()}
    return ", ".join(said) if len(said) == 1 else ", ".join(f"{value} ({count})" for value, count in said.items())
