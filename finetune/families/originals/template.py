"""What a diffusers folder says beside weights, for a single file, which says none of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import EMBEDDED, families, model_folder
from finetune.families.folder import Part, read_json
from finetune.families.originals import published
from finetune.families.originals.checkpoint import Checkpoint, read_checkpoint
from finetune.families.originals.layouts import SD2, Layout, layout_of
from finetune.families.schedulers import with_settings
from finetune.files import write_json
from finetune.objective import Prediction

_CLIPS = {  # whose tokenizer is that of every architecture -> where it lies
    "openai/clip-vit-large-patch14": "",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "tokenizer/",
    "stabilityai/stable-diffusion-xl-base-1.0": "tokenizer/",
    "stabilityai/stable-diffusion-2-1": "tokenizer/",
    "runwayml/stable-diffusion-v1-5": "tokenizer/",
    "CompVis/stable-diffusion-v1-4": "tokenizer/",
}
_VOCABULARY = ("vocab.json", "merges.txt")
_INDEX, _SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class Template:
    """A diffusers folder without weights.

    Attributes:
        source: what it was taken from, for messages.
        documents: JSON by its path in the folder.
        files: by their path in the folder, where they are copied from.
    """

    source: str
    documents: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, Path]

    def write(self, folder: Path) -> None:
        """Put it all into ``folder``, which may hold weights."""
        for path, document in self.documents.items():
            write_json(folder / path, document)
        for path, file in self.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / path)

    def digest(self) -> str:
        """SHA-256 of the content, hex."""
        found = hashlib.sha256(json.dumps(self.documents, sort_keys=True).encode())
        for path, file in sorted(self.files.items()):
            found.update(f"{path}\n".encode())
            found.update(file.read_bytes())
        return found.hexdigest()


def parts_of(layout: Layout) -> list[Part]:
    """The networks of a layout's family, in the order of the layout's components."""
    parts = {part.subfolder: part for part in families()[layout.family].parts.values()}
    return [parts[subfolder] for subfolder in layout.components]


def template(checkpoint: Checkpoint, config: ModelConfig) -> Template:
    """What belongs to a file: of ``model.like``, of the base that the file says it was trained from, where that lies on
    this machine, or of the published model.

    Raises:
        UserError: ``model.like`` is no model of the file's architecture; no tokenizer is found; or what a file of SD 2
            predicts is said nowhere.
    """
    prediction = config.prediction or checkpoint.prediction
    if (like := _like(checkpoint, config)) is not None:
        found = _of_folder(like, checkpoint.layout)
    else:
        if prediction is None and checkpoint.layout is SD2:
            raise UserError(
                f"model.prediction is missing: {checkpoint.path} does not say what it predicts, and models of "
                f"{SD2.name} differ; at 768 pixels it is mostly v_prediction, at 512 epsilon"
            )
        found = _published(checkpoint.layout, prediction := prediction or "epsilon")
    return _predicting(found, prediction, checkpoint.zero_terminal_snr)


def _like(checkpoint: Checkpoint, config: ModelConfig) -> Path | None:
    layout = checkpoint.layout
    if config.like is not None:
        folder = _settings(config.like, config.revision)
        if layout_of(folder) is not layout:
            raise UserError(f"model.like: {config.like} is another kind of model than {checkpoint.path}: {layout.name}")
        return folder
    origin = _origin(checkpoint)
    return origin if origin and layout_of(origin) is layout else None


def _origin(checkpoint: Checkpoint) -> Path | None:
    """The folder on this machine that a file's header leads to, by way of the files between, each trained from the
    next.
    """
    said, seen = checkpoint.metadata, {checkpoint.path.resolve()}
    while True:
        base = said.get("finetune.base", "")
        for name in (said.get("finetune.like", ""), base):
            if name == EMBEDDED or (name and (Path(name) / _INDEX).is_file()):
                return model_folder(ModelConfig(path=name))
        file = Path(base).resolve()
        if not file.is_file() or file.suffix != ".safetensors" or file in seen:
            return None
        seen.add(file)
        said = read_checkpoint(file).metadata


def _settings(like: str, revision: str | None) -> Path:
    """The folder of ``model.like``; of a hub model all but its weights is fetched."""
    from huggingface_hub import snapshot_download

    from finetune.families import on_hub

    if not on_hub(like):
        folder = model_folder(ModelConfig(path=like))
        if not (folder / _INDEX).is_file():
            raise UserError(f"model.like: {folder} is no diffusers folder: it has no {_INDEX}")
        return folder
    try:
        return Path(snapshot_download(like, revision=revision, allow_patterns=["*.json", "*.txt", "*.model"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.like: {like!r} is no folder and could not be fetched: {reason}") from error


def _of_folder(folder: Path, layout: Layout) -> Template:
    parts = parts_of(layout)
    kept = {"scheduler", *(name for part in parts for name in (part.subfolder, part.tokenizer) if name)}
    index = {
        key: [None, None] if isinstance(value, list) and key not in kept else value
        for key, value in read_json(folder / _INDEX).items()
        if key == "_class_name" or not key.startswith("_")
    }
    if "safety_checker" in index:
        index["requires_safety_checker"] = False
    documents: dict[str, Mapping[str, Any]] = {_INDEX: index, _SCHEDULER: read_json(folder / _SCHEDULER)}
    for part in parts:
        settings = read_json(folder / part.subfolder / "config.json")
        stored = ("dtype", "torch_dtype")  # of that folder's weights, not of these
        documents[f"{part.subfolder}/config.json"] = {key: settings[key] for key in settings if key not in stored}
    files = {
        f"{part.tokenizer}/{file.name}": file
        for part in parts
        if part.tokenizer
        for file in sorted((folder / part.tokenizer).glob("*"))
        if file.suffix in {".json", ".txt", ".model"}
    }
    return Template(str(folder), documents, files)


def _published(layout: Layout, prediction: Prediction) -> Template:
    tokenizers = [part.tokenizer for part in parts_of(layout) if part.tokenizer]
    files = {f"{folder}/{name}": file for folder in tokenizers for name, file in _vocabulary().items()}
    return Template(f"{layout.name} as it was published", published.documents(layout, prediction), files)


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
    index = {**found.documents[_INDEX], "scheduler": ["diffusers", type(scheduler).__name__]}
    return Template(found.source, {**found.documents, _INDEX: index, _SCHEDULER: said}, found.files)
