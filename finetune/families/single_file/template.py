"""What a diffusers folder says beside weights, for a single file, which says none of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import families
from finetune.families.parts import Part, file_digest, read_json
from finetune.families.schedulers import with_settings
from finetune.families.single_file import published
from finetune.families.single_file.checkpoint import Checkpoint
from finetune.families.single_file.layouts import SD2, Layout, layout_of
from finetune.families.single_file.origin import BESIDE, INDEX, fetched, origin
from finetune.files import write_json
from finetune.objective import Prediction

_SCHEDULER = "scheduler/scheduler_config.json"
_CLIPS = {  # whose tokenizer is that of every architecture -> where it lies
    "openai/clip-vit-large-patch14": "",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "tokenizer/",
    "stabilityai/stable-diffusion-xl-base-1.0": "tokenizer/",
    "stabilityai/stable-diffusion-2-1": "tokenizer/",
    "runwayml/stable-diffusion-v1-5": "tokenizer/",
    "CompVis/stable-diffusion-v1-4": "tokenizer/",
}
_VOCABULARY = ("vocab.json", "merges.txt")
_WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class Template:
    """A diffusers folder without what the file holds.

    Attributes:
        source: what it was taken from, for messages.
        parts: the model's networks, by their names in ``ModelFamily.networks``.
        documents: JSON by its path in the folder.
        files: by their path in the folder, where they are taken from: vocabularies, and weights that the file lacks.
    """

    source: str
    parts: Mapping[str, Part]
    documents: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, Path]

    def settings(self, part: Part) -> Mapping[str, Any]:
        """What ``config.json`` of a network says."""
        return self.documents[_config(part)]

    def write(self, folder: Path) -> None:
        """Put it all into ``folder``."""
        for path, document in self.documents.items():
            write_json(folder / path, document)
        for path, file in self.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            _put(file, folder / path)

    def digest(self) -> str:
        """SHA-256 of the content, hex."""
        found = hashlib.sha256(json.dumps(self.documents, sort_keys=True).encode())
        for path, file in sorted(self.files.items()):
            found.update(f"{path} {file_digest(file)}\n".encode())
        return found.hexdigest()


def template(checkpoint: Checkpoint, config: ModelConfig) -> Template:
    """What belongs to a file: of ``model.like``, of the base that the file says it was trained from, where that lies on
    this machine, or of the published model.

    Raises:
        UserError: ``model.like`` is no model of the file's architecture; it is missing, and something is needed that is
            found nowhere else; or what a file of SD 2 predicts is said nowhere.
    """
    layout = checkpoint.layout
    if config.prediction and layout.flow:
        raise UserError(f"model.prediction has no meaning for {layout.name}, which predicts one thing alone")
    prediction = None if layout.flow else config.prediction or checkpoint.prediction
    if (like := _like(checkpoint, config)) is not None:
        found = _of_folder(like, checkpoint)
    elif lacking := _needed(checkpoint):
        raise UserError(
            f"model.like is missing: {checkpoint.path} holds {lacking}; name a diffusers folder or hub name of the "
            f"same kind of model ({layout.name}), which that is taken from"
        )
    else:
        if prediction is None and layout is SD2:
            raise UserError(
                f"model.prediction is missing: {checkpoint.path} does not say what it predicts, and models of "
                f"{SD2.name} differ; at 768 pixels it is mostly v_prediction, at 512 epsilon"
            )
        found = _published(layout, prediction := prediction or "epsilon")
    return found if layout.flow else _predicting(found, prediction, checkpoint.zero_terminal_snr)


def _needed(checkpoint: Checkpoint) -> str:
    """What the published model's settings cannot stand in for; nothing where they can."""
    lacks = [f"no {', '.join(checkpoint.lacking)}"] if checkpoint.lacking else []
    return " and ".join([*lacks, *([] if published.knows(checkpoint.layout) else ["no settings and no tokenizers"])])


def _like(checkpoint: Checkpoint, config: ModelConfig) -> Path | None:
    layout = checkpoint.layout
    if config.like is not None:
        folder = fetched(config.like, config.revision, checkpoint.lacking)
        if layout_of(folder) is not layout:
            raise UserError(f"model.like: {config.like} is another kind of model than {checkpoint.path}: {layout.name}")
        return folder
    found = origin(checkpoint)
    return found if found and layout_of(found) is layout else None


def _of_folder(folder: Path, checkpoint: Checkpoint) -> Template:
    known = families()[checkpoint.layout.family].parts
    parts = {name: part for name, part in known.items() if (folder / _config(part)).is_file()}
    for name, part in known.items():
        if name not in parts and checkpoint.holds(part.subfolder):
            raise UserError(f"model.like: {folder} has no {part.subfolder}, which {checkpoint.path} holds")
    kept = {"scheduler", *(name for part in parts.values() for name in (part.subfolder, part.tokenizer) if name)}
    index = {
        key: [None, None] if isinstance(value, list) and key not in kept else value
        for key, value in read_json(folder / INDEX).items()
        if key == "_class_name" or not key.startswith("_")
    }
    if "safety_checker" in index:
        index["requires_safety_checker"] = False
    documents: dict[str, Mapping[str, Any]] = {INDEX: index, _SCHEDULER: read_json(folder / _SCHEDULER)}
    files: dict[str, Path] = {}
    for part in parts.values():
        settings, stored = read_json(folder / _config(part)), ("dtype", "torch_dtype")  # of that folder's weights
        documents[_config(part)] = {key: settings[key] for key in settings if key not in stored}
        if part.tokenizer:
            files |= _files(folder, part.tokenizer, lambda file: file.suffix in BESIDE)
        if not checkpoint.holds(part.subfolder):
            weights = _files(folder, part.subfolder, lambda file: _WEIGHTS.fullmatch(file.name) is not None)
            if not weights:
                raise UserError(
                    f"model.like: {folder} has no safetensors of the {part.subfolder}, and {checkpoint.path} holds none"
                )
            files |= weights
    return Template(str(folder), parts, documents, files)


def _files(folder: Path, subfolder: str, wanted: Callable[[Path], bool]) -> dict[str, Path]:
    return {f"{subfolder}/{file.name}": file for file in sorted((folder / subfolder).glob("*")) if wanted(file)}


def _put(file: Path, target: Path) -> None:
    """Weights are not copied where another name for them will do."""
    if file.suffix == ".safetensors":
        try:
            os.link(file.resolve(), target)
            return
        except OSError:  # on another disk, or one that has no links
            pass
    shutil.copyfile(file, target)


def _config(part: Part) -> str:
    return f"{part.subfolder}/config.json"


def _published(layout: Layout, prediction: Prediction) -> Template:
    parts = families()[layout.family].parts
    tokenizers = [part.tokenizer for part in parts.values() if part.tokenizer]
    files = {f"{folder}/{name}": file for folder in tokenizers for name, file in _vocabulary().items()}
    return Template(f"{layout.name} as it was published", parts, published.documents(layout, prediction), files)


def _vocabulary() -> dict[str, Path]:
    """The files of CLIP's tokenizer, out of the hub's local cache."""
    from huggingface_hub import try_to_load_from_cache

    for repository, folder in _CLIPS.items():
        found = {name: try_to_load_from_cache(repository, folder + name) for name in _VOCABULARY}
        if all(isinstance(file, str) for file in found.values()):
            return {name: Path(str(file)) for name, file in found.items()}
    clip, *_ = _CLIPS
    raise UserError(
        "model.like is missing: a single file holds no tokenizer, and CLIP's is not in the hub's local cache. Name a "
        "diffusers folder or hub name of the same kind of model, of which settings and tokenizers are taken, or fetch "
        f"CLIP's once: hf download {clip} {' '.join(_VOCABULARY)}"
    )


def _predicting(found: Template, prediction: Prediction | None, zero_terminal_snr: bool) -> Template:
    """``found`` with a scheduler for what the file says of itself."""
    import diffusers

    settings: dict[str, Any] = {"prediction_type": prediction} if prediction else {}
    if zero_terminal_snr:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    own = found.documents[_SCHEDULER]
    if all(own.get(key) == value for key, value in settings.items()):
        return found
    scheduler = with_settings(getattr(diffusers, own["_class_name"]).from_config(own), settings)
    said = json.loads(scheduler.to_json_string())
    said.pop("_diffusers_version", None)
    index = {**found.documents[INDEX], "scheduler": ["diffusers", type(scheduler).__name__]}
    return replace(found, documents={**found.documents, INDEX: index, _SCHEDULER: said})
