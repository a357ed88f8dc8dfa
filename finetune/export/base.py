"""The model that an adapter belongs to."""

from __future__ import annotations

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
        prompt_chunks: as in a recipe's ``model``; what the file says where it is not given, and 1 of a whole model,
            which does not say it.
        held: a recipe's ``model``, where the base shall lie in memory as it does there; else all of it is float32.

    Raises:
        UserError: neither names a model, there is no such model, or a base is named for a whole model.
    """
    from finetune.families import load_family

    if found.whole:
        if base is not None:
            raise UserError(f"{found.path} is a whole model and needs no base; {base!r} would not be used")
        return load_family(_as(held, path=str(found.path), prompt_chunks=prompt_chunks or 1))
    path = base or found.base
    if not path:
        raise UserError(f"{found.path} does not say which base model it belongs to; name it with --base")
    revision = None if base else found.metadata.get(f"{OWN}revision")
    chunks = prompt_chunks or found.prompt_chunks
    family = load_family(_as(held, path=path, revision=revision, prompt_chunks=chunks))
    family.sampling = sampling(found.metadata)
    return family


def _as(held: ModelConfig | None, **names: Any) -> ModelConfig:
    return (held or ModelConfig()).model_copy(update={"family": None, "revision": None, **names})
