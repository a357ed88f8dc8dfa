"""The model that an adapter belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.export.metadata import OWN, sampling
from finetune.export.read import Identity
from finetune.family import ModelFamily


def absence(found: Identity, base: str | None = None) -> str | None:
    """Why ``load_base`` would have to fetch a file's model or could not; None where it is here, or a user names one.

    A header may speak of a model of many gigabytes, which nobody asked for.
    """
    from finetune.families import at_hand

    if found.whole or base is not None:
        return None
    if not found.base:
        return "it does not say which base model it is for"
    config = ModelConfig(path=found.base, revision=found.metadata.get(f"{OWN}revision") or None)
    return None if at_hand(config) else f"its base {found.base} is not on this machine"


def load_base(
    found: Identity, base: str | None = None, prompt_chunks: int | None = None, held: ModelConfig | None = None
) -> ModelFamily:
    """The family of an adapter's base model, or of a whole model itself, with no network in memory yet.

    Args:
        base: as in a recipe's ``model.path``; what the file says where it is not given.
        prompt_chunks: as in a recipe's ``model``; what the file says where it is not given, and 1 of a model folder,
            which does not say it.
        held: a recipe's ``model``, where the base shall lie in memory as it does there; else all of it is float32.

    Raises:
        UserError: neither names a model, there is no such model, or a base is named for a whole model.
    """
    from finetune.families import load_family

    chunks = prompt_chunks or found.prompt_chunks
    if found.whole:
        if base is not None:
            raise UserError(f"{found.path} is a whole model and needs no base; {base!r} would not be used")
        return load_family(_as(held, path=str(found.path), prompt_chunks=chunks))
    path = base or found.base
    if not path:
        raise UserError(f"{found.path} does not say which base model it belongs to; name it with --base")
    family = load_family(_as(held, path=path, prompt_chunks=chunks, **_settings(found, path)))
    family.sampling = sampling(found.metadata)
    return family


def _settings(found: Identity, path: str) -> Mapping[str, Any]:
    """What else the file says of the base ``path``, if that is the one it was trained on.

    A single file in its place takes settings and tokenizers of the one it was trained on: the two are of one kind, or
    the adapter does not fit.
    """
    from finetune.families.single_file.origin import nearby

    said = found.metadata
    revision, like, prediction = (said.get(f"{OWN}{key}") or None for key in ("revision", "like", "base_prediction"))
    if path == found.base:
        return {"revision": revision, **({"like": like, "prediction": prediction} if Path(path).is_file() else {})}
    if not Path(path).is_file():
        return {}
    near = (nearby(name, revision) for name in (like, found.base) if name)
    return {"like": next((str(folder) for folder in near if folder), None)}


def _as(held: ModelConfig | None, **names: Any) -> ModelConfig:
    untold = dict.fromkeys(("family", "revision", "like", "prediction"))
    return (held or ModelConfig()).model_copy(update={**untold, **names})
