"""Published architectures, one file each, and the way from a recipe's ``model`` section to one of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from finetune.config.objective import ObjectiveConfig
from finetune.config.schema import ModelConfig
from finetune.errors import UserError, nearest
from finetune.families.sd import SD
from finetune.family import ModelFamily
from finetune.objectives import refined

EMBEDDED = "tinyworld"
FAMILIES: dict[str, type[SD]] = {"sd": SD}

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def load_family(
    config: ModelConfig, objective: ObjectiveConfig | None = None, device: torch.device | str = "cpu"
) -> ModelFamily:
    """The family of a base model, with no network in memory yet.

    Args:
        config: names a folder, a hub model or the embedded one. A folder is never looked for on a network.
        objective: what the recipe changes of what the base was trained on; nothing where it is not given.
        device: where its networks are put when they are required.

    Raises:
        UserError: there is no such model, no family knows its architecture, or ``objective`` does not fit it.
    """
    folder = model_folder(config)
    disable_progress_bar()  # of transformers, one per file loaded: it would tear the run's own
    kind = FAMILIES[config.family] if config.family else _detect(folder)
    family = kind(folder, source=config.path)
    family.objective = refined(family.process, objective or ObjectiveConfig())
    family.sampling = family.objective.sampling
    family.device = torch.device(device)
    return family


def model_folder(config: ModelConfig) -> Path:
    """Where a model's files are on this machine. A hub model that is not in the cache is fetched.

    Raises:
        UserError: there is no such folder or hub model.
    """
    if config.path == EMBEDDED:
        from finetune.tinyworld import BASE

        return Path(BASE)
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        return folder
    if _HUB_NAME.fullmatch(config.path) and not folder.parent.exists():
        return _fetch(config)
    raise UserError(f"model.path: no folder {config.path!r}{_neighbour(folder)}")


def _detect(folder: Path) -> type[SD]:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"model.path: {folder} is no diffusers folder: it has no model_index.json")
    pipeline = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    for family in FAMILIES.values():
        if pipeline in family.pipelines:
            return family
    known = ", ".join(sorted(name for family in FAMILIES.values() for name in family.pipelines))
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
    hint = nearest(wanted, [child.name for child in parent.iterdir() if child.is_dir()][:1000])
    return f"; in {parent}{hint.removeprefix(';')}" if "did you mean" in hint else f"; {parent} has no {wanted!r}"
