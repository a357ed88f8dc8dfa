"""Every method on every family in every layout: what is written, and which tools read it.

The answers are not a list that somebody keeps: each cell is an adapter that is made for a small random-weight twin of
the family, written, and asked of ``finetune inspect`` as the file of a published model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from finetune.adapter import Weights
from finetune.adapters import attach
from finetune.config.checks import FORMATS
from finetune.config.schema import ModelConfig, Recipe
from finetune.errors import UserError
from finetune.export import export, identify
from finetune.export.guess import called
from finetune.export.inspect import inspect
from finetune.families import families, load_family
from finetune.families.support import support
from finetune.family import ModelFamily, writable
from finetune.randomness import generator

_WORDS = {"kind": "embedding", "tokens": [{"token": "<zib>", "initializer": "star", "vectors": 2}]}
_LORA = {"kind": "lora", "rank": 3, "alpha": 2.0, "targets": "wide", "text_encoder": True}

METHODS: Mapping[str, Mapping[str, Any]] = {
    "lora": _LORA,
    "dora": {**_LORA, "use_dora": True},
    "loha": {"kind": "loha", "rank": 2},
    "lokr": {"kind": "lokr", "rank": 2},
    "oft": {"kind": "oft", "block_size": 4},
    "embedding": _WORDS,
    "pivotal": {"kind": "pivotal", "embedding": _WORDS, "weights": {**_LORA, "rank": 2}},
    "hypernetwork": {"kind": "hypernetwork"},
    "selection": {"kind": "full", "select": "attention"},
    "full": {"kind": "full", "text_encoder": True},
}
"""A section of each method; ``dora`` and ``selection`` are variants whose files differ."""

_VARIANTS = {"dora": "lora", "selection": "full"}
TOOLS = {"diffusers": "D", "comfyui": "C", "a1111": "A", "forge": "F", "kohya": "K", "peft": "P"}


@dataclass(frozen=True)
class Cell:
    """Files of one layout.

    Attributes:
        answers: tool -> "yes", or what goes wrong there.
    """

    family: str
    method: str
    layout: str
    answers: Mapping[str, str]


def places() -> list[tuple[str, str]]:
    """Every family with every method that has a place in it."""
    return [
        (name, method)
        for name, family in families().items()
        for method in METHODS
        if support(family)[_VARIANTS.get(method, method)] is None
    ]


def twin(name: str, folder: Path) -> Path:
    """Write a small model of a family with random weights."""
    module: Any = sys.modules[families()[name].__module__]
    written: Path = module.tiny(folder)
    return written


def made(folder: Path, method: str) -> tuple[ModelFamily, Any, Recipe]:
    """A model's family, an adapter in it that is as if it had learned, and the recipe that asks for all its layouts."""
    family = load_family(ModelConfig(path=str(folder)))
    section = {key: value for key, value in METHODS[method].items() if key != "text_encoder"}
    if METHODS[method].get("text_encoder"):
        section["text_encoder"] = bool(family.sites.text_encoders)
    if "weights" in section:
        section["weights"] = {**section["weights"], "text_encoder": bool(family.sites.text_encoders)}
    concept = {"folder": "pictures", "prompt": "a photo of <zib> star", "trigger": "<zib>"}
    recipe = Recipe.model_validate(
        {
            "recipe": "pivotal" if section["kind"] == "pivotal" else "dreambooth",
            "output": "zib",
            "model": {"path": str(folder)},
            "adapter": section,
            "data": {"concepts": [concept], "resolution": 16},
        }
    )
    adapter = attach(recipe.adapter, family, seed=0)
    with torch.no_grad():
        for group in adapter.groups():
            for name, parameter in group.parameters.items():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator(1, name)).to(parameter))
    return family, adapter, recipe


def asking(recipe: Recipe, layout: str | None, dtype: str = "float32") -> Recipe:
    """The recipe with one of ``finetune.config.checks.FORMATS``, or with what it writes unasked."""
    chosen = {"formats": [layout] if layout else None, "dtype": dtype}
    return recipe.model_copy(update={"export": recipe.export.model_copy(update=chosen)})


def formats(family: ModelFamily, recipe: Recipe) -> tuple[str, ...]:
    """What the recipe's method can be asked for in a family."""
    return writable(FORMATS[recipe.adapter.kind], family.export_names)


def written(
    parts: Sequence[Weights], family: ModelFamily, recipe: Recipe, folder: Path
) -> Iterator[tuple[str, Weights, Path]]:
    """The files of every layout that a method has in a family, each with its layout and the weights in it."""
    for chosen in formats(family, recipe):
        for weights in parts:
            try:
                paths = export(weights, family, asking(recipe, chosen), folder / chosen / weights.kind)
            except UserError:  # a layout of the method that the family has not
                continue
            yield from ((identify(path).layout, weights, path) for path in paths)


def cells(name: str, folder: Path) -> Iterator[Cell]:
    """Every cell of a family, made from its twin in ``folder``."""
    for method in (method for place, method in places() if place == name):
        family, adapter, recipe = made(folder, method)
        with TemporaryDirectory(prefix="finetune-formats-") as files:
            seen: set[str] = set()
            parts = [part.weights() for part in adapter.parts()]
            for layout, weights, path in written(parts, family, recipe, Path(files)):
                if layout in seen or (method == "pivotal" and weights.kind != "pivotal"):
                    continue
                seen.add(layout)
                yield Cell(name, method, layout, _answers(path, name))


def table() -> str:
    """The matrix as Markdown: a row for each method and layout, a column for each family."""
    with TemporaryDirectory(prefix="finetune-twins-") as folder:
        return render([cell for name in families() for cell in cells(name, twin(name, Path(folder) / name))])


def render(found: Sequence[Cell]) -> str:
    """``table`` of these cells."""
    names = list(families())
    rows = [["method", "layout", *(f"`{name}`" for name in names)], ["---"] * (len(names) + 2)]
    held = {(cell.method, cell.layout, cell.family): cell for cell in found}
    order = sorted({(cell.method, cell.layout): 0 for cell in found}, key=lambda row: list(METHODS).index(row[0]))
    for method, layout in order:
        rows.append([method, layout, *(short(held.get((method, layout, name))) for name in names)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _answers(path: Path, family: str) -> Mapping[str, str]:
    found = identify(path)
    if found.layout == "peft":
        return {"peft": "yes"}
    return inspect(path, called(family) or family).loads


def short(cell: Cell | None) -> str:
    """Letters of the tools that read a file, small where they read a part of it."""
    if cell is None:
        return "–"
    whole = [letter for tool, letter in TOOLS.items() if cell.answers.get(tool, "").startswith("yes")]
    partly = [letter.lower() for tool, letter in TOOLS.items() if cell.answers.get(tool, "").startswith("partly")]
    return " ".join([*whole, *partly]) or "written"
