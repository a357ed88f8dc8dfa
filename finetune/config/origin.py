"""What a recipe says of where pictures come from, and what in it cannot be meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import NonNegativeInt, PositiveInt

from finetune.config.section import Section, Text

if TYPE_CHECKING:
    from finetune.config.schema import ConceptConfig, Recipe

Found = tuple[tuple[str | int, ...], str]
"""A key, and the rest of a sentence that begins with it."""

ORIGINS = ("folder", "shards", "dataset")
EMBEDDED = "tinyworld:"  # folders of the embedded world bring their own prompts and trigger


class DatasetConfig(Section):
    """A table of pictures that Hugging Face `datasets` reads. Code that comes with a data set is never run."""

    path: Text
    """A hub name, a folder (of pictures, of tables, or written by `save_to_disk`), or Parquet files: one, a pattern
    such as `data/*.parquet`, or a URL of such."""
    name: Text | None = None
    """Which configuration, where the data set has several."""
    split: Text = "train"
    """Which part of it."""
    revision: Text | None = None
    """Commit, branch or tag of a hub data set."""
    image: Text = "image"
    """The column that holds pictures, as the bytes of their files."""
    text: Text | None = "text"
    """The column that holds captions; a list of them is a choice."""
    mask: Text | None = None
    """The column that holds masks."""
    streaming: bool = False
    """Pass over it once and keep the first `limit` pictures below the cache folder, in place of all of its tables."""
    limit: PositiveInt | None = None
    """Use its first rows alone, so many of them."""
    skip: list[NonNegativeInt] = []
    """Rows that are left out, counted from 0, such as those that are broken."""


def is_url(name: str) -> bool:
    """Whether ``name`` is a URL, such as ``s3://bucket/photos``, and no path."""
    return "://" in name


def contradictions(recipe: Recipe) -> Iterator[Found]:
    """Everything about sources that cannot be meant."""
    for index, concept in enumerate(recipe.data.concepts):
        at = ("data", "concepts", index)
        named = [key for key in ORIGINS if getattr(concept, key) is not None]
        if not named:
            yield (*at, "folder"), "is missing: pictures come from a folder, from shards or from a dataset"
        for key in named[1:]:
            yield (*at, key), f"is set beside {named[0]}: the pictures of a concept come from one place; add a concept"
        yield from (((*at, *path), text) for path, text in _unfit(concept))
    prior = recipe.prior
    if prior.kind == "images" and prior.folder is not None and is_url(prior.folder):
        yield (
            ("prior", "folder"),
            f"must be a folder of this machine, where class images are kept, not {prior.folder!r}",
        )


def _unfit(concept: ConceptConfig) -> Iterator[Found]:
    """Keys of a concept that its source cannot serve."""
    dataset = concept.dataset
    if concept.captions == "folder" and concept.folder is None:
        yield ("captions",), "is 'folder', but the pictures don't come from a folder, whose name would be the caption"
    if dataset is None:
        return
    if concept.captions in ("sidecar", "filename"):
        yield (
            ("captions",),
            f"must be auto, metadata or prompt, not {concept.captions!r}: rows of a dataset have no names",
        )
    if dataset.streaming and dataset.limit is None:
        yield ("dataset", "limit"), "is missing: so many pictures of the stream are kept"
    if concept.masks is not None and dataset.mask is not None:
        yield ("masks",), f"is set beside dataset.mask, which takes masks from the column {dataset.mask!r}"
    elif concept.masks not in (None, "alpha"):
        yield (
            ("masks",),
            f"must be alpha, not {concept.masks!r}: masks of a dataset are a column, which dataset.mask names",
        )
