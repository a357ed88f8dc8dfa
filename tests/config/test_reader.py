"""Recipes as files: every mistake is reported with its place, and what is right comes out typed."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import yaml
from written_recipes import GOOD, mutated, problems, written

from finetune.config import RecipeError, lock, read_recipe
from finetune.config.document import dump
from finetune.errors import UserError


def test_overrides_win_and_are_typed(tmp_path: Path) -> None:
    recipe = read_recipe(
        written(tmp_path, GOOD),
        [
            "train.steps=3",
            "train.learning_rate=1e-5",
            "train.schedule.name=cosine",
            "data.concepts.0.folder=other pictures",
            "data.concepts[0].repeats=2",
            "samples.prompts=[one, 'two: three']",
            "adapter.rank=8",
            "adapter.rank=9",
        ],
    )
    assert recipe.train.steps == 3
    assert recipe.train.learning_rate == 1e-5
    assert recipe.train.schedule.name == "cosine"
    assert recipe.data.concepts[0].folder == "other pictures"
    assert recipe.data.concepts[0].repeats == 2
    assert recipe.samples.prompts == ["one", "two: three"]
    assert recipe.adapter.kind == "lora" and recipe.adapter.rank == 9


def test_another_kind_by_override_whatever_its_place_among_them(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    for overrides in (["prior.kind=model", "prior.weight=0.5"], ["prior.weight=0.5", "prior.kind=model"]):
        prior = read_recipe(path, overrides).prior
        assert prior.kind == "model" and prior.weight == 0.5
    found = problems(path, "adapter.rank=3", "adapter.kind=full")
    assert len(found) == 1
    assert found[0].startswith(
        "override 'adapter.rank=3': adapter.rank is not a key of kind 'full'; `rank` belongs to kind 'lora'"
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trian.steps=3", "override 'trian.steps=3': trian is not a key; did you mean 'train'?"),
        ("train.stesp=3", "override 'train.stesp=3': train.stesp is not a key; did you mean 'steps'?"),
        ("train.steps=many", "override 'train.steps=many': train.steps must be a positive integer, not 'many'"),
        ("train.steps", "override 'train.steps': an override is written key.path=value"),
        ("=3", "override '=3': an override is written key.path=value"),
        ("train..steps=3", "an override is written key.path=value"),
        ("output='", "the value is not YAML"),
        ("train.steps.more=3", "train.steps must be a positive integer, not a section of keys"),
        ("data.concepts.1.folder=x", "data.concepts.1 does not exist; there are 1, from 0"),
    ],
)
def test_a_wrong_override_is_its_own_place(tmp_path: Path, override: str, said: str) -> None:
    found = problems(written(tmp_path, GOOD), override)
    assert len(found) == 1
    assert said in found[0]


def test_extends_inherits_through_chains(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    written(tmp_path, GOOD, "base/good.yaml")
    written(tmp_path, "extends: good.yaml\ntrain: {steps: 5}\nadapter: {kind: full}\n", "base/middle.yaml")
    top = written(tmp_path, "extends: base/middle.yaml\noutput: elsewhere\nadapter: {select: attention}\n")
    recipe = read_recipe(top)
    assert recipe.output == "elsewhere"
    assert recipe.train.steps == 5 and recipe.train.learning_rate == 1e-3
    assert recipe.adapter.kind == "full" and recipe.adapter.select == "attention"


def test_a_mistake_in_an_extended_file_names_that_file(tmp_path: Path) -> None:
    written(tmp_path, GOOD.replace("steps: 20", "steps: 20.5"), "base.yaml")
    path = written(tmp_path, "extends: base.yaml\noutput: x\nadapter: {rank: y}\n")
    assert problems(path) == [
        "recipe.yaml:3: adapter.rank must be a positive integer, not 'y'",
        "base.yaml:15: train.steps must be a positive integer, not 20.5",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: recipe.yaml", "recipe.yaml:1: extends goes round in a circle: recipe.yaml -> recipe.yaml"),
        (
            "a: 1\nextends: god.yaml",
            "recipe.yaml:2: extends names 'god.yaml', which does not exist; did you mean 'good.yaml'?",
        ),
        ("extends: [good.yaml]", "extends must be one file's name, not ['good.yaml']"),
        ("extends: .", "is a folder, not a recipe"),
    ],
)
def test_an_extends_that_leads_nowhere(tmp_path: Path, text: str, said: str) -> None:
    written(tmp_path, GOOD, "good.yaml")
    assert any(said in problem.replace(f"{tmp_path}/", "") for problem in problems(written(tmp_path, text)))


def test_a_circle_names_its_chain(tmp_path: Path) -> None:
    written(tmp_path, "extends: two.yaml", "one.yaml")
    written(tmp_path, "extends: three.yaml", "two.yaml")
    written(tmp_path, "extends: one.yaml", "three.yaml")
    assert problems(tmp_path / "one.yaml") == [
        "three.yaml:1: extends goes round in a circle: one.yaml -> two.yaml -> three.yaml -> one.yaml"
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "recipe.yaml:1: a recipe must be a section of keys, not nothing"),
        (b"- a\n", "a recipe must be a section of keys, not ['a']"),
        (b"just words", "a recipe must be a section of keys, not 'just words'"),
        (b"recipe: lora\noutput: caf\xe9\n", "recipe.yaml:2: is not UTF-8 text"),
        (b"\x00\x01\x02", "recipe.yaml:1: is not YAML"),
        (b"a" * (2 << 20), "larger than 1 MiB"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert any(said in problem for problem in problems(path))


def test_a_missing_file_is_told_with_its_neighbour(tmp_path: Path) -> None:
    written(tmp_path, GOOD, "star.yaml")
    assert problems(tmp_path / "stra.yaml") == ["stra.yaml: does not exist; did you mean 'star.yaml'?"]
    assert "nor does the folder" in problems(tmp_path / "nowhere" / "star.yaml")[0]
    assert "is a folder" in problems(tmp_path)[0] or "cannot be read" in problems(tmp_path)[0]


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert read_recipe(path).recipe == "dreambooth"


def test_a_recipe_error_is_a_user_error() -> None:
    assert issubclass(RecipeError, UserError)


def test_a_lock_reads_back_equal_and_says_every_default(tmp_path: Path) -> None:
    recipe = read_recipe(
        written(tmp_path, GOOD), ["data.concepts.0.trigger='1e5'", "data.concepts.0.prompt=a 1e5 star"]
    )
    text = lock(recipe)
    assert "mixed_precision" in text
    assert read_recipe(written(tmp_path, text, "recipe.lock.yaml")) == recipe
    assert yaml.safe_load(text)["train"]["mixed_precision"] == "no"  # other readers of YAML see the same


def test_every_recipe_of_the_toolkit_is_right() -> None:
    configs = sorted(Path(__file__).parents[2].glob("recipes/configs/*.yaml"))
    assert configs
    for path in configs:
        recipe = read_recipe(path)
        assert recipe.output


@pytest.mark.parametrize("seed", range(10))
def test_any_file_gives_a_recipe_or_problems_with_their_places(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    wrong = 0
    for number in range(50):
        path = written(tmp_path, dump(mutated(rng)))
        try:
            recipe = read_recipe(path)
        except RecipeError as error:
            wrong += 1
            for problem in error.problems:
                assert re.match(rf"{re.escape(str(path))}:\d+: \S", problem), f"mutation {number}: {problem!r}"
        else:
            assert read_recipe(written(tmp_path, lock(recipe), "lock.yaml")) == recipe
    assert wrong > 25


@pytest.mark.parametrize("seed", range(2))
def test_any_bytes_give_a_recipe_or_problems(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "recipe.yaml"
    for _ in range(50):
        content = bytearray(GOOD.encode())
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(content))
            match rng.randrange(3):
                case 0:
                    content[at] = rng.randrange(256)
                case 1:
                    del content[at : at + rng.randrange(30)]
                case 2:
                    content[at:at] = rng.choice(
                        [b"\n", b":", b"  ", b"&a ", b"*a", b"!!", b"{", b"]", b"'", b"|", b"\t"]
                    )
        path.write_bytes(bytes(content))
        try:
            read_recipe(path)
        except RecipeError as error:
            assert all(problem.startswith(str(path)) for problem in error.problems)
