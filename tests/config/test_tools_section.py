"""``export.for``: a recipe names tools, and the toolkit picks the layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
from written_recipes import GOOD, problems, written

from finetune.config import lock, read_recipe
from finetune.config.tools import READS, formats, methods

WORDS = "{kind: embedding, tokens: [{token: <zib>}]}"


@pytest.mark.parametrize(
    ("adapter", "tools", "said"),
    [
        ("{kind: lora, use_dora: true}", "kohya", "it reads the LoRA that use_dora: false trains"),
        ("{kind: loha}", "kohya", "reads no LyCORIS without its module; it reads kind: lora"),
        ("{kind: oft}", "comfyui", "reads no rotations of inputs; it reads kind: lora, loha or lokr"),
        ("{kind: hypernetwork}", "forge", "comfyui and a1111 do, and it reads kind: lora"),
        ("{kind: hypernetwork, activation: gelu}", "comfyui", "knows no activation 'gelu'; it knows elu, leakyrelu"),
        ("{kind: hypernetwork, activation: relu, layer_norm: true}", "comfyui", "with activate_output: true it reads"),
        ("{kind: lora}", "a1111, a1111", "must name each tool once"),
        ("{kind: lora}", "automatic1111", "must be one of diffusers, comfyui, a1111, forge"),
    ],
)
def test_a_tool_that_cannot_read_a_method_is_refused_with_the_nearest_that_it_can(
    tmp_path: Path, adapter: str, tools: str, said: str
) -> None:
    (found,) = problems(written(tmp_path, GOOD), f"adapter={adapter}", f"export.for=[{tools}]")
    assert "export.for" in found
    assert said in found


def test_tools_and_formats_are_one_choice(tmp_path: Path) -> None:
    (found,) = problems(written(tmp_path, GOOD), "export={for: [comfyui], formats: [kohya]}")
    assert "only one of them can choose" in found


def test_every_method_says_of_every_tool_what_it_reads() -> None:
    tools = ["diffusers", "comfyui", "a1111", "forge", "kohya", "invokeai", "stable-diffusion.cpp"]
    assert list(READS["lora"]) == [
        "diffusers",
        "comfyui",
        "a1111",
        "forge",
        "invokeai",
        "stable-diffusion.cpp",
        "kohya",
    ]
    assert all(set(read) <= set(tools) and "diffusers" in read for read in READS.values())
    assert formats(["comfyui", "diffusers", "a1111"], "lora") == ("kohya", "diffusers")
    assert formats(["comfyui", "diffusers", "a1111"], "full") == ("single-file", "diffusers")
    assert formats(["comfyui", "diffusers"], "selection") == ("single-file", "delta")


def test_the_lock_says_the_key_as_the_recipe_does(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, GOOD), ["export.for=[comfyui, diffusers]"])
    assert recipe.export.tools == ["comfyui", "diffusers"]
    again = tmp_path / "again.yaml"
    again.write_text(lock(recipe), encoding="utf-8")
    assert "for:" in lock(recipe) and read_recipe(again) == recipe


def test_a_pivotal_pair_asks_for_both_its_parts(tmp_path: Path) -> None:
    adapter = f"{{kind: pivotal, embedding: {WORDS}, weights: {{kind: lora, use_dora: true}}}}"
    recipe = read_recipe(
        written(tmp_path, GOOD), ["recipe=pivotal", "prior.kind=none", f"adapter={adapter}", "export.for=[comfyui]"]
    )
    assert methods(recipe.adapter) == ("dora", "embedding")
