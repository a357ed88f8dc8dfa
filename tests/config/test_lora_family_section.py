"""Variants of LoRA that cannot be had together are refused, with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from finetune.config import RecipeError, read_recipe
from finetune.config.adapters import LoraConfig

RECIPE = {
    "recipe": "lora",
    "output": "runs/star",
    "data": {"concepts": [{"folder": "pictures", "prompt": "a photo of a star"}]},
    "train": {"steps": 4},
}


def written(folder: Path, **adapter: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "adapter": adapter}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"use_dora": True, "rank_dropout": 0.1}, "adapter.rank_dropout must be 0 with use_dora"),
        ({"use_dora": True, "max_norm": 1.0}, "adapter.max_norm is set with use_dora"),
        ({"init": "pissa", "dropout": 0.1}, "adapter.dropout must be 0 with init: pissa"),
        ({"init": "pissa", "rank_dropout": 0.1}, "adapter.rank_dropout must be 0 with init: pissa"),
        ({"init": "pissa", "module_dropout": 0.1}, "adapter.module_dropout must be 0 with init: pissa"),
        ({"init": "pissa", "max_norm": 1.0}, "adapter.max_norm is set with init: pissa"),
        ({"ranks": {"(": 4}}, "is no regular expression"),
        ({"ranks": {".*": 0}}, "must be a positive integer, not 0"),
        ({"module_dropout": 1.0}, "adapter.module_dropout must be a number from 0 to below 1"),
        ({"lora_plus_ratio": 0.0}, "adapter.lora_plus_ratio must be a positive number"),
        ({"kind": "oft", "rank": 4}, "adapter.rank is not a key of kind 'oft'"),
        ({"kind": "oft", "block_size": 1}, "adapter.block_size must be"),
        ({"kind": "lokr", "rank_dropout": 0.1}, "adapter.rank_dropout is not a key of kind 'lokr'"),
        ({"kind": "loha", "factor": 4}, "adapter.factor is not a key of kind 'loha'"),
    ],
)
def test_what_cannot_be_meant_is_named(tmp_path: Path, adapter: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(written(tmp_path, **{"kind": "lora", **adapter}))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "formats", "said"),
    [
        ("oft", ["kohya"], "must hold peft"),
        ("lokr", ["diffusers"], "must hold peft or kohya"),
        ("lora", ["peft"], "diff"),
    ],
)
def test_layouts_that_a_kind_has_not(tmp_path: Path, kind: str, formats: list[str], said: str) -> None:
    path = written(tmp_path, kind=kind)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, [f"export.formats=[{', '.join(formats)}]"])
    assert "export.formats" in str(caught.value) and said in str(caught.value)


def test_what_goes_together_is_read(tmp_path: Path) -> None:
    adapter = {
        "use_dora": True,
        "lora_plus_ratio": 16,
        "ranks": {".*attn2.*": 8},
        "module_dropout": 0.1,
        "dropout": 0.1,
    }
    found = read_recipe(written(tmp_path, kind="lora", **adapter)).adapter
    assert isinstance(found, LoraConfig)
    assert (found.lora_plus_ratio, found.ranks) == (16.0, {".*attn2.*": 8})
    assert found.summary == "DoRA of rank 16 on attention"


@pytest.mark.parametrize("kind", ["lora", "lokr", "loha", "oft"])
@pytest.mark.parametrize("recipe", ["lora", "dreambooth"])
def test_recipes_take_the_whole_family(tmp_path: Path, kind: str, recipe: str) -> None:
    overrides = [f"recipe={recipe}"]
    if recipe == "dreambooth":
        overrides += ["data.concepts.0.prompt=a photo of zib star", "data.concepts.0.trigger=zib"]
    found = read_recipe(written(tmp_path, kind=kind), overrides)
    assert found.adapter.kind == kind
    assert ("rank" in found.adapter.summary) == (kind != "oft")
