"""Sizes that cannot be meant are refused by their key, before any picture is looked at."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.config import read_recipe
from finetune.config.reader import RecipeError

RECIPE = Path("recipes/configs/dreambooth-tiny.yaml")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["data.resolution=48", "data.buckets={step: 64}"], r"data.buckets.step is 64, more than the resolution 48"),
        (["data.buckets={step: 64}", "data.more_resolutions=[48]"], r"step is 64, more than the resolution 48"),
        (
            ["data.buckets={step: 16, smallest: 128}"],
            r"data.buckets.smallest comes to 128, more than the",
        ),
        (["data.buckets={step: 16, largest: 40}"], r"data.buckets.largest comes to 32, less than the"),
        (["data.more_resolutions=[64]"], r"data.more_resolutions.0 is 64, which is there already"),
        (["data.more_resolutions=[32, 32]"], r"data.more_resolutions.1 is 32, which is there already"),
    ],
)
def test_sizes_that_fit_nothing_are_refused(changes: list[str], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        read_recipe(RECIPE, changes)


def test_sizes_that_fit_are_taken() -> None:
    recipe = read_recipe(RECIPE, ["data.buckets={step: 16}", "data.more_resolutions=[48, 32]"])
    assert recipe.data.buckets is not None and recipe.data.buckets.limits(64) == (32, 128)


@pytest.mark.parametrize("change", ["data.buckets={step: 16}", "data.more_resolutions=[48]"])
def test_an_aesthetic_embedding_has_no_sizes(change: str) -> None:
    with pytest.raises(RecipeError, match="has no part in an aesthetic embedding"):
        read_recipe(Path("recipes/configs/aesthetic-tiny.yaml"), [change])
