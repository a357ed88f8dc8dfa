"""Published architectures, one file each, and the way from a recipe's ``model`` section to one of them.

A module of this package with a ``FAMILY`` is found by itself; one of another distribution by an entry point of the
group ``finetune.families`` that names its class.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import pkgutil
import re
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from finetune import tinyworld
from finetune.config.objective import ObjectiveConfig
from finetune.config.schema import ModelConfig
from finetune.errors import UserError, nearest
from finetune.family import ModelFamily
from finetune.objectives import refined

EMBEDDED = tinyworld.NAMES
GROUP = "finetune.families"

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILES = (".safetensors", ".ckpt")  # endings that no repository's name has


@functools.cache
def families() -> Mapping[str, Any]:
    """Every known family's class by its name, those of this package first."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    own = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    others = [point.load() for point in entry_points(group=GROUP)]
    return {family.name: family for family in (*sorted(own, key=lambda family: family.name), *others)}


def load_family(
    config: ModelConfig, objective: ObjectiveConfig | None = None, device: torch.device | str = "cpu"
) -> ModelFamily:
    """The family of a base model, with no network in memory yet.

    Args:
        config: names a folder, a single file, a hub model or the embedded one. A folder or file is never looked for on
            a network.
        objective: what the recipe changes of what the base was trained on; nothing where it is not given.
        device: where its networks are put when they are required.

    Raises:
        UserError: there is no such model, no family knows its architecture, or ``objective`` does not fit it.
    """
    folder = model_folder(config)
    disable_progress_bar()  # of transformers, one per file loaded: it would tear the run's own
    kind = _named(config.family) if config.family else _detect(folder)
    if config.prompt_chunks > 1 and kind.chunks is not None:
        raise UserError(
            f"model.prompt_chunks: {config.prompt_chunks} has no place in {kind.name}: {kind.chunks.reason}"
        )
    family: ModelFamily = kind(folder, source=config.path)
    wanted = objective or ObjectiveConfig()
    family.objective = refined(family.process, wanted)
    family.sampling = family.objective.sampling
    family.device = torch.device(device)
    family.model = config
    family.prompt_chunks = config.prompt_chunks
    if wanted.guidance is not None:
        if family.guidance is None:
            raise UserError(f"objective.guidance: is for guidance-distilled models; {config.path} is told none")
        family.guidance = wanted.guidance
    return family


def model_folder(config: ModelConfig) -> Path:
    """Where a model's files are on this machine, in diffusers' layout.

    A single file is converted once (``single_file.convert``), a hub model that is not in the cache is fetched.

    Raises:
        UserError: there is no such folder, file or hub model, or the file cannot be converted.
    """
    path = Path(config.path).expanduser()
    if path.is_file() and config.path not in EMBEDDED:
        from finetune.families.single_file.convert import converted

        return converted(config)
    for key in ("like", "prediction"):
        if getattr(config, key) is not None:
            raise UserError(f"model.{key} is for a single file, and {config.path!r} is none")
    if config.path in EMBEDDED:
        return tinyworld.base(config.path)
    if path.is_dir():
        return path
    if on_hub(config.path):
        return _fetch(config)
    raise UserError(f"model.path: no folder or file {config.path!r}{_neighbour(path)}")


def on_hub(name: str) -> bool:
    """Whether ``name`` can only mean a model of the Hugging Face hub."""
    path = Path(name).expanduser()
    return _HUB_NAME.fullmatch(name) is not None and path.suffix not in _FILES and not path.parent.exists()


def at_hand(config: ModelConfig) -> bool:
    """Whether a model's files are on this machine, so that ``model_folder`` would fetch nothing large."""
    if config.path in EMBEDDED or Path(config.path).expanduser().exists():
        return True
    if not on_hub(config.path):
        return False
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(config.path, "model_index.json", revision=config.revision), str)


def _named(name: str) -> Any:
    if name not in families():
        raise UserError(f"model.family: {name!r} is not known{nearest(name, families())}")
    return families()[name]


def _detect(folder: Path) -> Any:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"model.path: {folder} is no diffusers folder: it has no model_index.json")
    pipeline = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    for family in families().values():
        if pipeline in family.pipelines:
            return family
    known = ", ".join(sorted(name for family in families().values() for name in family.pipelines))
    raise UserError(f"{index}: no family knows {pipeline!r}; supported: {known}")


def _fetch(config: ModelConfig) -> Path:
    """A hub model's folder in the local cache. Safetensors only: pickles from strangers are never opened."""
    from diffusers import DiffusionPipeline

    try:
        fetched = DiffusionPipeline.download(
            config.path, revision=config.revision, use_safetensors=True, safety_checker=None, feature_extractor=None
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.path: {config.path!r} is no folder and could not be fetched: {reason}") from error
    return Path(fetched)


def _neighbour(folder: Path) -> str:
    """A hint: what a folder that does exist holds under a similar name."""
    parent, wanted = folder.absolute().parent, folder.name
    while not parent.is_dir():
        parent, wanted = parent.parent, parent.name
    models = (child.name for child in parent.iterdir() if child.is_dir() or child.suffix == ".safetensors")
    hint = nearest(wanted, itertools.islice(models, 1000))
    return f"; in {parent}{hint.removeprefix(';')}" if "did you mean" in hint else f"; {parent} has no {wanted!r}"
