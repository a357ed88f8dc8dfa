"""An adapter file of any trainer, layer by layer: only the layers that are asked for are in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from finetune.config.schema import ModelConfig
from finetune.errors import GuardError, UserError
from finetune.export import guess, lycoris_peft
from finetune.export.keys import Key, algorithm, parse
from finetune.export.layers import Layer, check, check_shape
from finetune.export.lycoris import Change
from finetune.export.metadata import OWN
from finetune.export.read import locate, read_header
from finetune.export.stream import shapes, tensors
from finetune.export.tools import spelling
from finetune.export.tools.published import PUBLISHED
from finetune.family import ExportNames, ModelFamily

ALPHA = f"{OWN}alpha"
"""Header of files whose layout has no alpha: the one that their layers had in common."""
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_BLOCK = re.compile(r"[^.]+\.(.*?\.)?\d+(\.(attentions|resnets)\.\d+)?(?=\.|$)")
"""The part of a layer's name up to its first number, and in levels of U-Nets up to the second."""
_PARTS = {
    "unet": "denoiser",
    "transformer": "denoiser",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
}


@dataclass(frozen=True)
class Stem:
    """What one layer's tensors in a file are called: part -> key."""

    path: Path
    keys: Mapping[str, Key]


class Source:
    """An adapter file, or a folder of PEFT's.

    Args:
        path: a file of a low-rank adapter of any trainer, a folder with PEFT's ``adapter_config.json``, or a run's.
        base: as in a recipe's ``model.path``; what the header says where it is not given. Where neither is at hand,
            the names of the published model are taken that the layers are of.

    Attributes:
        kind: "lora" or "lycoris".
        layout: as ``finetune.export.keys.Key`` says: "kohya", "diffusers", "before peft", "comfyui", "peft".
        metadata: of the header, with the base that was named.
        family: of the base, no network loaded; None where it is not at hand.
        names: of the networks.
        outline: name -> layer without numbers, on the device "meta": shapes, ranks and alphas.
        dtype: of the numbers, the widest.

    Raises:
        UserError: there is no such file, it is no such adapter, or its model cannot be told.
    """

    def __init__(self, path: Path, base: str | None = None) -> None:
        self.path, weights, self._config = _opened(path)
        self.metadata: dict[str, str] = {} if self.path.is_dir() else read_header(self.path)[1]
        held = {file: shapes(file) for file in weights}
        keys = [(file, _parsed(file, text)) for file, found in held.items() for text in found]
        self.layout = "peft" if self.path.is_dir() else keys[0][1].layout if keys else ""
        if not keys:
            raise UserError(f"{path}: holds no tensors")
        sizes = {text: shape for found in held.values() for text, (_, shape) in found.items()}
        self.family = _family(self.metadata, base)
        if base is not None:
            self.metadata = {**self.metadata, f"{OWN}base": base, f"{OWN}revision": ""}
        self.names = self.family.export_names if self.family else _published(path, [key for _, key in keys], sizes)
        self.dtype = _widest([held[file][key.text][0] for file, key in keys if key.part != "alpha"])
        stems: dict[tuple[Path, str], dict[str, Key]] = {}
        for file, key in keys:
            stems.setdefault((file, key.layer), {})[key.part] = key
        self.kind = _kind(path, stems.values())
        self._stems: dict[str, Stem] = {}
        self.outline: dict[str, Layer | Change] = {}
        for (file, _), parts in stems.items():
            stem = Stem(file, parts)
            for layer in self._read(stem):
                if layer.name in self._stems:
                    raise UserError(f"{path}: holds {layer.name} twice, under different names")
                self._stems[layer.name], self.outline[layer.name] = stem, outlined(layer)

    def __iter__(self) -> Iterator[str]:
        """Names of the layers, sorted."""
        return iter(sorted(self.outline))

    def __contains__(self, name: object) -> bool:
        return name in self.outline

    def get(self, name: str) -> Layer | Change:
        """A layer, read from the file.

        Raises:
            UserError: its tensors do not fit each other, or a number is not finite.
        """
        found = next(layer for layer in self._read(self._stems[name]) if layer.name == name)
        try:
            check(parts_of(found))
            if isinstance(found, Layer):
                check_shape(found)
        except GuardError as error:
            raise UserError(f"{self.path}: {name}: {error}") from error
        return found

    def layer(self, name: str) -> Layer:
        """A layer of a LoRA.

        Raises:
            UserError: the file is none.
        """
        found = self.get(name)
        if not isinstance(found, Layer):
            raise UserError(f"{self.path}: is no LoRA but {found.algorithm}, which has no factors to work with")
        return found

    @property
    def alpha(self) -> float | None:
        """That of all layers; of a file without one what its header says; None where layers differ."""
        alphas = {layer.alpha for layer in self.outline.values() if isinstance(layer, Layer)}
        said = self.metadata.get(ALPHA, "")
        if said and re.fullmatch(r"[0-9.e+-]+", said):
            return float(said)
        return alphas.pop() if len(alphas) == 1 else None

    def _read(self, stem: Stem) -> Sequence[Layer | Change]:
        held = self._tensors(stem)
        if self.kind == "lora":
            found = spelling.low_rank(stem.keys, held, self.names, self._config)
            network = _PARTS.get(stem.path.parent.name) if self.path.is_dir() else None
            return [replace(layer, network=network) for layer in found] if network else found
        if self.layout == "kohya":
            return spelling.changes(stem.keys, held, self.names)
        return lycoris_peft.unpack(held, self.metadata, self.names)

    def _tensors(self, stem: Stem) -> dict[str, Tensor]:
        return tensors(stem.path, [key.text for key in stem.keys.values()])


def groups(names: Sequence[str]) -> list[list[str]]:
    """Layers that a layout may write together: those of one block."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        block = _BLOCK.match(name)
        found.setdefault(block[0] if block else name.partition(".")[0], []).append(name)
    return list(found.values())


def parts_of(layer: Layer | Change) -> dict[str, Tensor]:
    """The tensors of a layer."""
    if isinstance(layer, Change):
        return dict(layer.parts)
    lengths = {} if layer.magnitude is None else {"magnitude": layer.magnitude}
    return {"down": layer.down, "up": layer.up, **lengths}


def outlined(layer: Layer | Change) -> Layer | Change:
    """A layer without its numbers."""
    if isinstance(layer, Change):
        return replace(layer, parts={part: tensor.to("meta") for part, tensor in layer.parts.items()})
    lengths = None if layer.magnitude is None else layer.magnitude.to("meta")
    return replace(layer, down=layer.down.to("meta"), up=layer.up.to("meta"), magnitude=lengths)


def _opened(path: Path) -> tuple[Path, list[Path], spelling.Config]:
    """What is read, its files of weights, and what is said beside them."""
    if path.is_dir():
        folders = [folder for folder in (path, *(path / part for part in _PARTS)) if (folder / _CONFIG).is_file()]
        if folders:
            for folder in folders:
                if not (folder / _WEIGHTS).is_file():
                    raise UserError(f"{folder}: has PEFT's {_CONFIG} but no {_WEIGHTS}")
            settings = [json.loads((folder / _CONFIG).read_text(encoding="utf-8")) for folder in folders]
            scales = [{key: one.get(key) for key in ("lora_alpha", "alpha_pattern", "use_rslora")} for one in settings]
            if any(one != scales[0] for one in scales):
                raise UserError(f"{path}: its parts are scaled in different ways; name the folder of one part")
            return path, [folder / _WEIGHTS for folder in folders], spelling.Config.of_peft(settings[0])
    found = locate(path)
    if found.is_dir() or found.suffix != ".safetensors":
        raise UserError(f"{found}: is no file of a low-rank adapter, which are safetensors")
    return found, [found], spelling.Config(read_header(found)[1])


def _parsed(path: Path, text: str) -> Key:
    key = parse(text)
    if key is None:
        raise UserError(f"{path}: {text!r} is no key of a low-rank adapter")
    if key.part == "word":
        raise UserError(f"{path}: {text!r} is a new word; take the files of the word and of the LoRA by themselves")
    if key.part == "bias":
        raise UserError(f"{path}: {text!r} is a trained bias, which no other layout has a place for")
    return key


def _kind(path: Path, stems: Iterable[Mapping[str, Key]]) -> str:
    kinds: dict[str, str] = {}
    for parts in stems:
        found = "lora" if algorithm(parts) in ("lora", "dora", "tucker") else "lycoris"
        kinds.setdefault(found, next(iter(parts.values())).text)
    if len(kinds) > 1:
        raise UserError(
            f"{path}: holds low-rank factors ({kinds['lora']}) and other changes ({kinds['lycoris']}); there is no "
            "layout for both"
        )
    return next(iter(kinds))


def _family(metadata: Mapping[str, str], base: str | None) -> ModelFamily | None:
    from finetune.families import at_hand, load_family

    if base:
        return load_family(ModelConfig(path=base))
    if not (said := metadata.get(f"{OWN}base")):
        return None
    config = ModelConfig(path=said, revision=metadata.get(f"{OWN}revision") or None)
    try:
        return load_family(config) if at_hand(config) else None  # nothing is fetched for the sake of names
    except UserError:
        return None  # of an architecture that is not known here


def _published(path: Path, keys: Sequence[Key], sizes: Mapping[str, Sequence[int]]) -> Mapping[str, ExportNames]:
    family = guess.family(keys, sizes) or ""
    if family not in PUBLISHED:
        known = f"is for {guess.FAMILIES[family]}, which" if family else "is for a model that"
        raise UserError(f"{path}: {known} is not known by its layers alone; name the model with --base")
    return PUBLISHED[family]


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest
