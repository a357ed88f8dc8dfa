"""The model card: front matter that the hub reads, and a page that says how to draw with what is there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune.config import Recipe
from finetune.export.inspect import Inspection, inspect
from finetune.export.metadata import OWN
from finetune.export.origin import triggers
from finetune.export.read import Identity
from finetune.families import EMBEDDED
from finetune.publish import tools
from finetune.publish.gather import Gathered
from finetune.publish.markdown import code, fenced, table
from finetune.publish.private import without_place

_FAMILIES = {"sd": "stable-diffusion", "sdxl": "stable-diffusion-xl"}  # what the hub calls them; others as they are
_KINDS = {
    "lora": ["lora", "template:sd-lora"],
    "lycoris": ["lora", "lycoris"],
    "embedding": ["textual_inversion"],
    "hypernetwork": ["hypernetwork"],
    "aesthetic": ["aesthetic-gradients"],
}
Seen = Sequence[tuple[Identity, Inspection]]
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        repository: ``owner/name``.
        base: the base model's name on the hub; None where it has none.
        prompt: an example of how to ask for what was learned; empty where none is known.
        triggers: words that call it.
        license: identifier of the hub; None where none was given.
    """

    repository: str
    gathered: Gathered
    base: str | None
    prompt: str
    triggers: Sequence[str]
    license: str | None = None

    @classmethod
    def of(cls, gathered: Gathered, repository: str, license: str | None = None) -> Card:
        """What files and the run's recipe tell."""
        words = [word for piece in gathered.pieces for word in triggers(piece.path, piece.metadata)]
        concepts = gathered.recipe.data.concepts if gathered.recipe else []
        words += [concept.trigger for concept in concepts if concept.trigger]
        told = list(dict.fromkeys(part for word in words for part in word.split(", ")))
        longest = [word for word in told if not any(word != one and word in one.split() for one in told)]
        hints = [piece.metadata.get("modelspec.usage_hint", "").removeprefix("prompt: ") for piece in gathered.pieces]
        prompts = [*(concept.prompt for concept in concepts), *hints, *longest]
        return cls(
            repository=repository,
            gathered=gathered,
            base=_base(gathered),
            prompt=next((prompt for prompt in prompts if prompt), ""),
            triggers=longest,
            license=license,
        )

    def __str__(self) -> str:
        front = yaml.safe_dump(front_matter(self), sort_keys=False, allow_unicode=True, width=1000)
        return f"---\n{front}---\n\n" + "\n\n".join(_sections(self)) + "\n"


def front_matter(card: Card) -> dict[str, Any]:
    """What the hub reads, in its order; every value is plain."""
    gathered = card.gathered
    whole = any(piece.whole for piece in gathered.pieces)
    found: dict[str, Any] = {
        "base_model": card.base,
        "base_model_relation": ("finetune" if whole else "adapter") if card.base else None,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": card.license,
        "instance_prompt": card.prompt,
        "tags": tags(gathered),
        "widget": [
            {"text": picture.prompt or card.prompt or "-", "output": {"url": name}}
            for name, picture in gathered.pictures.items()
        ],
    }
    return {key: value for key, value in found.items() if value}


def tags(gathered: Gathered) -> list[str]:
    """By which the hub finds it."""
    kinds = [tag for piece in gathered.pieces for tag in _KINDS.get(piece.kind, [])]
    families = [piece.metadata.get(f"{OWN}family", "") for piece in gathered.pieces]
    recipes = [gathered.recipe.recipe.replace("_", "-")] if gathered.recipe and gathered.recipe.recipe != "lora" else []
    named = [_FAMILIES.get(family, family) for family in families if family]
    return list(dict.fromkeys(["text-to-image", "diffusers", *named, *kinds, *recipes]))


def _base(gathered: Gathered) -> str | None:
    return next((one for one in _bases(gathered) if _HUB_NAME.fullmatch(one) and not Path(one).exists()), None)


def _bases(gathered: Gathered) -> list[str]:
    said = [gathered.recipe.model.path] if gathered.recipe else [piece.base for piece in gathered.pieces]
    return [one for one in said if one]


def _sections(card: Card) -> Iterator[str]:
    gathered = card.gathered
    seen = [(piece, inspect(piece.path)) for piece in gathered.pieces]
    yield f"# {card.repository.partition('/')[2]}"
    kinds = " and ".join(dict.fromkeys(one.kind for _, one in seen))
    of = f" for {code(card.base)}" if card.base else ""
    by = f", made with {maker}" if (maker := seen[0][1].made_by) else ""
    yield f"{kinds[:1].upper()}{kinds[1:]}{of}{by}."
    if gathered.pictures:
        yield "<Gallery />"
    if card.triggers:
        calls = ", ".join(map(code, card.triggers))
        yield f"## Trigger words\n\n{calls}" + (f", as in {code(card.prompt)}." if card.prompt else ".")
    yield f"## Files\n\n{_files(seen)}"
    yield "## Use it"
    base = card.base or next((one for one in _bases(gathered) if one in EMBEDDED), None)
    script = tools.diffusers(card.repository, base, gathered.used, card.prompt)
    yield f"### diffusers\n\n{fenced(script, 'python')}"
    yield from tools.sections([(piece, one.loads) for piece, one in seen])
    yield f"## How it was trained\n\n{table(('setting', 'value'), list(_settings(gathered, seen)))}"
    if gathered.versions:
        made = ", ".join(f"{name} {version}" for name, version in gathered.versions.items())
        yield f"With {made}." + (" All settings: `recipe.lock.yaml`." if gathered.recipe else "")


def _files(seen: Seen) -> str:
    rows = []
    for piece, one in seen:
        name = "`model_index.json` and its folders" if piece.path.is_dir() else code(piece.path.name)
        rows.append((name, one.kind, *(one.loads.get(tool, "no") for tool in tools.NAMES)))
    return table(("file", "what it is", *tools.NAMES.values()), rows)


def _settings(gathered: Gathered, seen: Seen) -> Iterator[tuple[str, str]]:
    recipe, first = gathered.recipe, gathered.pieces[0].metadata
    looked = seen[0][1]
    said = {
        "recipe": recipe.recipe if recipe else first.get(f"{OWN}recipe"),
        "what": recipe.adapter.summary if recipe else looked.kind,
        "rank": ", ".join(map(str, looked.ranks)),
        "layers": ", ".join(f"{network} {count}" for network, count in looked.layers.items()),
        "base": without_place(recipe.model.path if recipe else first.get(f"{OWN}base", "")),
        "steps": str(recipe.train.total_steps) if recipe else first.get(f"{OWN}steps"),
        "seed": str(recipe.seed) if recipe else first.get(f"{OWN}seed"),
        **(_of_recipe(recipe) if recipe else _of_header(first)),
    }
    yield from ((name, code(value)) for name, value in said.items() if value)


def _of_recipe(recipe: Recipe) -> dict[str, str]:
    train = recipe.train
    return {
        "resolution": str(recipe.data.resolution),
        "batch": f"{train.batch_size} x {train.gradient_accumulation_steps}",
        "learning rate": f"{train.learning_rate:g}",
        "optimizer": train.optimizer.name,
        "prior preservation": recipe.prior.kind,
    }


def _of_header(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a file says of its training besides, as one line of JSON."""
    try:
        settings = json.loads(metadata.get(f"{OWN}settings", "{}"))
    except ValueError:
        return {}
    if not isinstance(settings, dict):
        return {}
    return {str(key): without_place(str(value)) for key, value in settings.items()}
