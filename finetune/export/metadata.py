"""What a LoRA file says about itself: readers' own fields, ModelSpec's, and where it came from.

Nothing here depends on the time or on the folder of the run, so that equal runs write equal bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune import __version__
from finetune.config.schema import Recipe
from finetune.export import objective
from finetune.export.layers import Layer
from finetune.family import ModelFamily

OWN = "finetune."


def describe(
    layout: str, layers: Sequence[Layer], settings: dict[str, str], family: ModelFamily, recipe: Recipe
) -> dict[str, str]:
    """Header of a LoRA file, all strings.

    ``finetune.*`` says how it was made and of how many layers; ``modelspec.*`` is ModelSpec 1.0.1
    (https://github.com/Stability-AI/ModelSpec); ``ss_*`` are the fields that A1111 and kohya's tools read.
    """
    side = recipe.data.resolution
    own = {
        "version": __version__,
        "kind": "lora",
        "layout": layout,
        "family": family.name,
        **base_of(recipe),
        "prompt_chunks": str(recipe.model.prompt_chunks) if recipe.model.prompt_chunks > 1 else "",
        "recipe": recipe.recipe,
        "steps": str(recipe.train.total_steps),
        "seed": str(recipe.seed),
        "layers": str(len(layers)),
        "settings": json.dumps(settings, sort_keys=True),
        "lock": locked(recipe),
        "objective": objective.refinements(recipe.objective),
        "scheduler": json.dumps(dict(family.sampling), sort_keys=True) if family.sampling else "",
    }
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{family.published.architecture}/lora",
        "implementation": family.published.code if layout == "kohya" else "diffusers",
        "title": title(recipe),
        "resolution": f"{side}x{side}",
        "prediction_type": {"v_prediction": "v", "flow_prediction": ""}.get(prediction(family), prediction(family)),
        "trigger_phrase": ", ".join(triggers(recipe)),
        "usage_hint": usage(recipe),
    }
    described = {f"{OWN}{key}": own[key] for key in own} | {f"modelspec.{key}": spec[key] for key in spec}
    if layout == "kohya" and layers:
        described |= _kohya(layers, family, recipe)
    return {key: value for key, value in described.items() if value}


def _kohya(layers: Sequence[Layer], family: ModelFamily, recipe: Recipe) -> dict[str, str]:
    rank = Counter(layer.rank for layer in layers).most_common(1)[0][0]
    alpha = str(layers[0].alpha)
    convolves = any(layer.down.shape[2:] not in ((), (1, 1)) for layer in layers)
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps({"conv_dim": str(rank), "conv_alpha": alpha} if convolves else {}),
        "ss_sd_model_name": recipe.model.path,
        "ss_resolution": f"({recipe.data.resolution}, {recipe.data.resolution})",
        "ss_seed": str(recipe.seed),
        "ss_steps": str(recipe.train.total_steps),
        "ss_v2": str(family.published.shelf == "SD2"),
        "ss_base_model_version": base_version(family),
        **objective.kohya(recipe.objective),
    }


def base_of(recipe: Recipe) -> dict[str, str]:
    """The base as the recipe names it; what it leaves out is empty."""
    model = recipe.model
    return {
        "base": model.path,
        "revision": model.revision or "",
        "like": model.like or "",
        "base_prediction": model.prediction or "",
    }


def locked(recipe: Recipe) -> str:
    """What decided the run, every default written out, as JSON: nothing of where it is kept and how it was watched.

    Of absolute paths only the last part is told, for files are given away.
    """
    told = recipe.model_dump(mode="json", exclude={"output", "checkpoint", "samples", "report"})
    for section, keys in (("data", ["cache"]), ("train", ["device", "threads"])):
        told[section] = {key: value for key, value in told[section].items() if key not in keys}
    return json.dumps(_without_folders(told), sort_keys=True)


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def side_file(recipe: Recipe, family: ModelFamily) -> dict[str, Any]:
    """What A1111 and Forge show beside a LoRA; they insert ``activation text`` into the prompt with it."""
    return {
        "description": title(recipe),
        "sd version": family.published.shelf,
        "activation text": ", ".join(triggers(recipe)),
        "preferred weight": 1.0,
        "negative text": "",
        "notes": usage(recipe),
    }


def triggers(recipe: Recipe) -> list[str]:
    """Words that call what was learned: ``trigger`` with what ``class_prompt`` calls it, "zib star", where it is the
    end of the prompt, else the trigger alone.
    """
    found = []
    for concept in recipe.data.concepts:
        if concept.trigger:
            prompt = concept.prompt or ""
            start = prompt.find(concept.trigger)
            found.append(prompt[start:] if start >= 0 else concept.trigger)
    return list(dict.fromkeys(found))


def title(recipe: Recipe) -> str:
    """A name for people: what was learned, or the recipe."""
    return ", ".join(triggers(recipe)) or f"{recipe.recipe} adapter"


def usage(recipe: Recipe) -> str:
    """How to ask for what was learned, or an empty string."""
    prompts = [concept.prompt for concept in recipe.data.concepts if concept.prompt]
    return f"prompt: {prompts[0]}" if prompts else ""


def prediction(family: ModelFamily) -> str:
    """What the denoiser predicts, in diffusers' words."""
    return family.objective.prediction


def sampling(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Settings of the scheduler that a file must be sampled with, where its header says them as ``describe`` does."""
    try:
        said = json.loads(metadata.get(f"{OWN}scheduler", "{}"))
    except ValueError:
        return {}
    kinds = {"prediction_type": str, "rescale_betas_zero_snr": bool, "timestep_spacing": str}
    return {key: said[key] for key, kind in kinds.items() if isinstance(said, dict) and isinstance(said.get(key), kind)}


def base_version(family: ModelFamily) -> str:
    """What kohya's tools call the version of the base; empty for a base that is none of its kinds."""
    version = family.published.version
    return f"{version}_v" if version == "sd_v2" and prediction(family) == "v_prediction" else version
