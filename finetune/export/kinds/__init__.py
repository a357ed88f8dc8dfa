"""What can be exported: one module for each kind of trained weights, each with the functions of ``Kind``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from finetune.config.tools import READS
from finetune.config.tools import formats as tools_formats

if TYPE_CHECKING:
    from finetune.adapter import Weights
    from finetune.config.schema import Recipe
    from finetune.export.checks import Report
    from finetune.export.read import Identity
    from finetune.family import ModelFamily

KINDS = ("full", "pivotal", "lora", "lycoris", "aesthetic", "hypernetwork", "embedding")
"""Names of the modules beside this one; files are tried in this order."""


class Contents(NamedTuple):
    """What can be seen of a file without reading its tensors.

    Attributes:
        keys: of its tensors, sorted; of an old pickle those of its outermost mapping as text, or "" for a bare tensor.
        metadata: of its header; empty for a pickle.
    """

    path: Path
    keys: list[str]
    metadata: dict[str, str]


class Kind(Protocol):
    """The functions of a module of this package."""

    LAYOUTS: tuple[str, ...]
    """What its files may look like, the one that ``finetune sample`` draws with first."""

    def require_learned(self, weights: Weights, recipe: Recipe) -> None:
        """Refuse weights that are where they began, as far as they tell themselves.

        Raises:
            GuardError: they are.
        """
        ...

    def write(self, weights: Weights, family: ModelFamily, recipe: Recipe, folder: Path) -> list[Path]:
        """Write ``weights`` in the layouts that the recipe names, each file whole or not at all."""
        ...

    def recognise(self, contents: Contents) -> str | None:
        """The layout of a file of this kind; None for any other file."""
        ...

    def readers(self, layout: str) -> tuple[str, ...]:
        """The tools that files of a layout are for."""
        ...

    def check(
        self, report: Report, found: Identity, base: str | None, against: Sequence[str], weights: Weights | None
    ) -> None:
        """Put every question to a file, the cheapest first. ``weights`` are what it must hold, where they are known."""
        ...

    def apply(self, pipeline: Any, found: Identity, strength: float) -> None:
        """Let a pipeline draw with a file, by its own library's loader where there is one.

        Raises:
            UserError: the file does not fit the pipeline.
        """
        ...


def wanted(recipe: Recipe, method: str, layouts: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``layouts`` that the recipe asks for, by name or by the tools that read them.

    Args:
        method: a key of ``finetune.config.tools.READS``; another one where no tool needs what it is.
    """
    formats = asked(recipe, method)
    return layouts if formats is None else tuple(name for name in layouts if name in formats)


def asked(recipe: Recipe, method: str) -> Sequence[str] | None:
    """The formats that the recipe asks for; None where it leaves them to the method. Arguments as of ``wanted``."""
    tools = recipe.export.tools
    if tools is None:
        return recipe.export.formats
    return tools_formats(tools, method) if method in READS else ()


def kind(name: str) -> Kind:
    """The module for weights or files of a kind."""
    return cast(Kind, import_module(f"{__name__}.{name}"))
