"""What pydantic found wrong with a recipe, as sentences that say where, what, and the nearest right thing."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from finetune.config.describe import (
    Listed,
    chosen_by,
    element,
    entry,
    is_section,
    kind_of,
    kinds,
    options,
    owners,
    wanted,
    wanted_of,
)
from finetune.config.document import Located, Place, Problem
from finetune.config.schema import Recipe
from finetune.config.section import Section, fields
from finetune.errors import nearest

# What other trainers call it.
ALSO_CALLED = {
    "accumulate": "train.gradient_accumulation_steps",
    "caption_dropout_rate": "data.caption_dropout",
    "caption_prefix": "data.wording.prefix",
    "caption_separator": "data.wording.separator",
    "caption_suffix": "data.wording.suffix",
    "caption_tag_dropout_rate": "data.wording.tag_dropout",
    "caption_column": "data.concepts.0.dataset.text",
    "checkpoint": "model.path",
    "checkpointing_steps": "checkpoint.every",
    "checkpoints_total_limit": "checkpoint.keep",
    "class_data_dir": "prior.folder",
    "dataset_config_name": "data.concepts.0.dataset.name",
    "dataset_name": "data.concepts.0.dataset.path",
    "debiased_estimation_loss": "objective.weighting",
    "discrete_flow_shift": "objective.timesteps.shift",
    "enable_bucket": "data.buckets",
    "enable_wildcard": "data.wording.wildcards",
    "epochs": "train.steps",
    "huber_c": "objective.loss.delta",
    "huber_schedule": "objective.loss.schedule",
    "image_column": "data.concepts.0.dataset.image",
    "image_dir": "data.concepts.0.folder",
    "images": "data.concepts.0.folder",
    "input_perturbation": "objective.noise.perturbation",
    "instance_data_dir": "data.concepts.0.folder",
    "instance_prompt": "data.concepts.0.prompt",
    "ip_noise_gamma": "objective.noise.perturbation",
    "logit_mean": "objective.timesteps.distribution.mean",
    "logit_std": "objective.timesteps.distribution.std",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "loss_type": "objective.loss.kind",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.schedule.name",
    "lr_scheduler_num_cycles": "train.schedule.cycles",
    "lr_scheduler_power": "train.schedule.power",
    "lr_warmup_steps": "train.schedule.warmup_steps",
    "max_timestep": "objective.timesteps.max",
    "max_train_steps": "train.steps",
    "min_snr_gamma": "objective.weighting: {kind: min_snr, gamma: 5}",
    "min_timestep": "objective.timesteps.min",
    "mode_scale": "objective.timesteps.distribution.scale",
    "multires_noise_discount": "objective.noise.pyramid.discount",
    "multires_noise_iterations": "objective.noise.pyramid.levels",
    "network_alpha": "adapter.alpha",
    "network_dim": "adapter.rank",
    "network_dropout": "adapter.dropout",
    "noise_offset": "objective.noise.offset",
    "num_class_images": "prior.count",
    "num_repeats": "data.concepts.0.repeats",
    "optimizer_args": "train.optimizer.options",
    "optimizer_type": "train.optimizer.name",
    "output_dir": "output",
    "prediction_type": "objective.prediction",
    "pretrained_model_name_or_path": "model.path",
    "prior_loss_weight": "prior.weight",
    "sample_batch_size": "prior.batch_size",
    "shuffle_caption": "data.wording.shuffle",
    "snr_gamma": "objective.weighting: {kind: min_snr, gamma: 5}",
    "target_modules": "adapter.targets",
    "timestep_sampling": "objective.timesteps.distribution",
    "token_warmup_step": "data.wording.tag_warmup_steps",
    "train_batch_size": "train.batch_size",
    "train_data_dir": "data.concepts.0.folder",
    "train_text_encoder": "adapter.text_encoder",
    "use_ema": "train.ema.decay",
    "validation_prompt": "samples.prompts",
    "warmup": "train.schedule.warmup_steps",
    "weighting_scheme": "objective.weighting",
}

FEW = 10  # keys that a message can list beside what it says


@dataclass(frozen=True)
class _Spot:
    """Where an error is: keys without pydantic's names of union members, and what the schema wants there."""

    path: tuple[str | int, ...]
    section: type[Section]  # that holds the last key
    wanted: str


def explain(error: ValidationError, tree: Located) -> list[Problem]:
    """One problem for everything that ``error`` found in ``tree``."""
    found = [(details, _spot(details["loc"])) for details in error.errors()]
    paths = {spot.path for _, spot in found}
    problems: dict[tuple[str | int, ...], Problem] = {}
    for details, spot in found:
        deeper = any(len(path) > len(spot.path) and path[: len(spot.path)] == spot.path for path in paths)
        if not deeper:  # the members of a union each complain; the one that came furthest is the one that was meant
            kind = details["type"] if spot.path == () or details["loc"][-1] == spot.path[-1] else "wrong"
            problems.setdefault(spot.path, _problem(kind, spot, tree))
    return list(problems.values())


def place_of(tree: Located, path: Sequence[str | int]) -> Place:
    """Where ``path`` stands, or the nearest thing above it that stands anywhere."""
    node = tree
    for part in path:
        below = node.below(part)
        if below is None:
            break
        node = below
    return node.place


def dotted(path: Sequence[str | int]) -> str:
    """``data.concepts.0.folder``: how a key is named in messages and overrides."""
    return ".".join(map(str, path))


def _problem(kind: str, spot: _Spot, tree: Located) -> Problem:
    value, name = _value(tree, spot.path), dotted(spot.path) or "a recipe"
    if kind == "missing" and isinstance(spot.path[-1], str):
        field = fields(spot.section)[spot.path[-1]]
        text = f"{name} is missing: {_first_line(field) or wanted_of(field)}"
    elif kind == "extra_forbidden":
        text = f"{name} is not a key{_hint(spot, tree)}"
    elif kind.startswith("union_tag") and isinstance(value, dict):
        choices = spot.wanted.partition("(")[2].rstrip(")")
        key = chosen_by(fields(spot.section)[str(spot.path[-1])].annotation)
        said = value.get(key)
        name, spot = f"{name}.{key}", _Spot((*spot.path, key), spot.section, spot.wanted)
        if said is None:
            text = f"{name} is missing; one of {choices}"
        else:
            close = nearest(said, choices.split(", ")) if isinstance(said, str) else ""
            text = f"{name} must be one of {choices}, not {shown(said)}" + (close if "mean" in close else "")
    else:
        text = f"{name} must be {spot.wanted}, not {shown(value)}"
        if isinstance(value, bool | int | float) and spot.wanted.startswith("text"):
            text += "; put it in quotes"
    return Problem(place_of(tree, spot.path), text)


def shown(value: Any) -> str:
    """A value of a recipe as messages quote it."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case "":
            return "an empty one"
        case str():
            return repr(value if len(value) <= 60 else f"{value[:57]}...")
        case dict():
            return "a section of keys"
        case list():
            if not value:
                return "an empty list"
            inside = f"[{', '.join(map(shown, value))}]"
            return inside if len(inside) <= 40 else f"a list of {len(value)}"
    return f"{value}"[:60]


def _value(tree: Located, path: Sequence[str | int]) -> Any:
    node: Located | None = tree
    for part in path:
        node = node.below(part) if node is not None else None
    return node.plain() if node is not None else None


def _spot(location: Sequence[str | int]) -> _Spot:
    """Follow pydantic's location through the schema."""
    path: tuple[str | int, ...] = ()
    section: type[Section] = Recipe
    here: Any = Recipe
    words = wanted(Recipe)
    for part in location:
        if is_section(here):
            section = here
            path = (*path, part)
            found = fields(section).get(str(part))
            if found is None:
                return _Spot(path, section, "")
            here, words = found.annotation, wanted_of(found)
            if len(options(here)) == 1:
                here = options(here)[0]
        elif part in kinds(here):
            here = kinds(here)[str(part)]
            words = wanted(here)
        elif entry(here) is not None:
            path = (*path, part)
            here = entry(here)
            words = wanted(here)
        elif isinstance(part, int):
            if element(here) is None:  # a tuple: the whole of it is described
                return _Spot(path, section, words)
            path = (*path, part)
            here = element(here)
            words = wanted(here)
    return _Spot(path, section, words)


def _hint(spot: _Spot, tree: Located) -> str:
    """The nearest right thing for a key that the section does not have."""
    key, above = str(spot.path[-1]), dotted([part for part in spot.path[:-1] if isinstance(part, str)])
    own = list(fields(spot.section))
    here = [repr(listed.kind) for listed in owners(key) if listed.path == above]  # the same section of another kind
    by = spot.section.chosen_by
    others = [listed for listed in owners(key) if listed.path != above]
    if here:
        kind = shown(_value(tree, (*spot.path[:-1], by)) or kind_of(spot.section))
        homes = [f"{by} {one}" for one in here]
        homes += [f"to {_called(listed)}" for listed in others if not listed.path.startswith(f"{above}.")]
        few = f"; {kind} has {', '.join(sorted(set(own) - {by}))}" if len(own) <= FEW else ""
        return f" of {by} {kind}; `{key}` belongs to {' or '.join(dict.fromkeys(homes))}{few}"
    if others:
        return f"; `{key}` belongs to {' or '.join(dict.fromkeys(map(_called, others)))}"
    if close := difflib.get_close_matches(key, own, n=1, cutoff=0.7):
        return f"; did you mean {close[0]!r}?"
    if called := difflib.get_close_matches(key, ALSO_CALLED, n=1, cutoff=0.85):
        right = ALSO_CALLED[called[0]]
        section, _, last = right.rpartition(".")
        return f"; did you mean {(last if section == above else right)!r}?"
    return nearest(key, own)


def _called(listed: Listed) -> str:
    if not listed.path:
        return "the top of the recipe"
    return f"`{listed.path}`" + (f" of {listed.section.chosen_by} {listed.kind!r}" if listed.kind else "")


def _first_line(field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).partition(". ")[0].rstrip(".")
