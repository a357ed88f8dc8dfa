"""Recipes as files: ``extends``, overrides, and every mistake in them reported at once, with its line.

Paths in a recipe are taken as the user of a command means them: relative to the current folder. Only ``extends`` is
relative to the file it stands in.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from finetune.config.checks import contradictions
from finetune.config.document import Located, Place, Problem, dump, overlay, parse
from finetune.config.problems import dotted, explain, place_of, shown
from finetune.config.profiles import laid_under
from finetune.config.schema import Recipe
from finetune.errors import UserError, nearest

MAX_BYTES = 1 << 20


class RecipeError(UserError):
    """Everything wrong with a recipe, one problem a line.

    Attributes:
        problems: the lines.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        found = list(dict.fromkeys(problems))
        order = {source: rank for rank, source in enumerate(dict.fromkeys(p.place.source for p in found))}
        found.sort(key=lambda problem: (order[problem.place.source], problem.place.line))
        self.problems = tuple(map(str, found))
        super().__init__("\n".join(self.problems))


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file. Its ``extends`` names a file whose keys it inherits; mappings merge deep, lists replace,
            and a section of another `kind` replaces.
        overrides: ``train.steps=200``, ``data.concepts.0.folder=pictures``; values are YAML and win over the file.

    Raises:
        RecipeError: naming every problem of the files and overrides, each with its place.
    """
    problems: list[Problem] = []
    tree = laid_under(_with_overrides(_load(path, problems, ()), overrides, problems))
    try:
        recipe = Recipe.model_validate(tree.plain())
    except ValidationError as error:
        raise RecipeError([*problems, *explain(error, tree)]) from None
    problems += [Problem(place_of(tree, c.path), f"{dotted(c.path)} {c.text}") for c in contradictions(recipe)]
    if problems:
        raise RecipeError(problems)
    return recipe


def lock(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML that ``read_recipe`` reads back to an equal recipe."""
    return dump(recipe.model_dump(mode="json"))


def _load(path: Path, problems: list[Problem], chain: tuple[Path, ...]) -> Located:
    """A file on top of what it extends."""
    tree, found = parse(_text(path), str(path))
    problems += found
    if not isinstance(tree.value, dict):
        if found:
            raise RecipeError(problems)
        raise RecipeError(
            [*problems, Problem(tree.place, f"a recipe must be a section of keys, not {shown(tree.plain())}")]
        )
    extends = tree.value.pop("extends", None)
    if extends is None:
        return tree
    if not isinstance(extends.value, str):
        problems.append(Problem(extends.place, f"extends must be one file's name, not {shown(extends.plain())}"))
        return tree
    chain = (*chain, path)
    parent = Path(os.path.normpath(path.parent / extends.value))
    if not os.path.isfile(parent):  # noqa: PTH113 - a name that is too long is no file either
        raise RecipeError(
            [*problems, Problem(extends.place, f"extends names {str(parent)!r}, which {_absence(parent)}")]
        )
    if any(_same(parent, child) for child in chain):
        names = " -> ".join(map(str, (*chain, parent)))
        raise RecipeError([*problems, Problem(extends.place, f"extends goes round in a circle: {names}")])
    return replace(overlay(_load(parent, problems, chain), tree, problems), place=tree.place)


def _with_overrides(tree: Located, overrides: Sequence[str], problems: list[Problem]) -> Located:
    """All overrides are laid over the recipe together, so that ``adapter.kind`` need not come first."""
    together = Located({}, Place("overrides"))
    for override in overrides:
        path, equals, text = override.partition("=")
        place = Place(f"override {override!r}")
        keys = re.sub(r"\[(\d+)\]", r".\1", path.strip()).split(".")
        if not equals or not all(keys):
            problems.append(Problem(place, "an override is written key.path=value"))
            continue
        value, found = parse(text.strip(), place.source, line=0)
        if found:
            problems += [Problem(place, "the value is not YAML; put it in quotes") for _ in found[:1]]
            continue
        for key in reversed(keys):
            value = Located({key: value}, place)
        together = overlay(together, value, problems)
    return overlay(tree, together, problems)


def _text(path: Path) -> str:
    place = Place(str(path))
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = _absence(path) if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise RecipeError([Problem(place, reason)]) from None
    if len(content) > MAX_BYTES:
        raise RecipeError([Problem(place, f"is no recipe: it is larger than {MAX_BYTES >> 20} MiB")])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError([Problem(Place(str(path), line), "is not UTF-8 text; save it as UTF-8")]) from None


def _absence(path: Path) -> str:
    """Says that ``path`` is missing, and which of its neighbours may be meant."""
    if os.path.isdir(path):  # noqa: PTH112
        return "is a folder, not a recipe"
    folder = path.parent
    try:
        names = [entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml")]
    except OSError:
        return f"does not exist, and nor does the folder {str(folder)!r}"
    hint = nearest(path.name, names)
    return f"does not exist{hint if len(names) <= 12 or 'mean' in hint else ''}"


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
