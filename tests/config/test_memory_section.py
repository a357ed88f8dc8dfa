"""How a base lies in memory, as a recipe says it; and profiles, which fill what it leaves unset."""

from __future__ import annotations

from pathlib import Path

import pytest
from written_recipes import GOOD, problems, written

from finetune.config import lock, read_recipe
from finetune.config.checks import contradictions
from finetune.config.memory import Int8Config, Nf4Config
from finetune.config.profiles import capacity, filled, profiles, with_profile
from finetune.config.schema import Recipe

FROZEN = ["adapter={kind: lora}", "prior={kind: none}"]
CHECKPOINTED = "train.gradient_checkpointing=true"


def read(folder: Path, *overrides: str) -> Recipe:
    return read_recipe(written(folder, GOOD), [*FROZEN, *overrides])


@pytest.mark.parametrize("name", profiles())
@pytest.mark.parametrize("adapter", ["{kind: lora}", "{kind: full}"])
def test_every_profile_goes_with_every_way_to_train(tmp_path: Path, name: str, adapter: str) -> None:
    recipe = read_recipe(written(tmp_path, GOOD), [f"adapter={adapter}", "recipe=dreambooth", f"profile={name}"])
    assert filled(recipe)
    assert read_recipe(written(tmp_path, lock(recipe), "lock.yaml")) == recipe


def test_smaller_profiles_hold_the_base_in_fewer_bits(tmp_path: Path) -> None:
    kinds = [read(tmp_path, f"profile={name}").model.quantize for name in profiles()]
    assert [kind and kind.kind for kind in kinds] == ["nf4", "nf4", "int8", None, None]
    assert [capacity(name) for name in profiles()] == sorted(map(capacity, profiles()))


def test_what_the_recipe_says_wins(tmp_path: Path) -> None:
    recipe = read(tmp_path, "profile=12gb", "model.quantize={kind: int8}", "train.mixed_precision=no")
    assert recipe.model.quantize == Int8Config(kind="int8")
    assert recipe.train.mixed_precision == "no"
    assert set(filled(recipe)) == {"model.dtype", "model.vae_tiling", "train.gradient_checkpointing"}
    assert read(tmp_path, "profile=12gb", "model.quantize=null").model.quantize is None


def test_a_section_may_be_changed_in_part(tmp_path: Path) -> None:
    found = read(tmp_path, "profile=12gb", "model.quantize.skip=['ff']").model.quantize
    assert found == Nf4Config(kind="nf4", text_encoders=True, skip=["ff"])


def test_a_profile_may_be_inherited(tmp_path: Path) -> None:
    written(tmp_path, GOOD + "profile: 24gb\n", "base.yaml")
    recipe = read_recipe(written(tmp_path, "extends: base.yaml\n"), FROZEN)
    assert recipe.model.dtype == "bfloat16"


def test_a_base_that_trains_stays_whole(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, GOOD), ["adapter={kind: full}", "profile=8gb"])
    assert (recipe.model.dtype, recipe.model.quantize, recipe.model.block_swap) == ("float32", None, 0)
    assert recipe.train.optimizer.name == "adafactor"


def test_another_profile_takes_the_place_of_the_first(tmp_path: Path) -> None:
    recipe = read(tmp_path, "profile=8gb", "model.block_swap=3")
    other = with_profile(recipe, "80gb")
    assert other.model.quantize is None
    assert not other.train.gradient_checkpointing
    assert other.model.block_swap == 3  # which the recipe said itself
    plain = read(tmp_path)
    assert with_profile(with_profile(plain, "8gb"), None) == plain
    assert with_profile(plain, "12gb") == read(tmp_path, "profile=12gb")
    assert not list(contradictions(with_profile(plain, "8gb")))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.dtype=bf16"], "model.dtype must be one of float32, bfloat16, float16, not 'bf16'"),
        (["profile=10gb"], "profile must be one of 8gb, 12gb, 16gb, 24gb, 80gb, not '10gb'"),
        (["model.quantize={kind: int4}"], "model.quantize.kind must be one of int8, fp8, nf4, not 'int4'"),
        (["adapter={kind: full}", "model.dtype=bfloat16"], "model.dtype must be float32: weights of the base train"),
        (["adapter={kind: full}", "model.quantize={kind: int8}"], "model.quantize is set, but weights of the base"),
        (["adapter={kind: full}", "model.block_swap=1", CHECKPOINTED], "model.block_swap is set, but weights"),
        (["model.dtype=float16"], "train.mixed_precision must be fp16 with model.dtype float16, not no: gradients"),
        (
            ["model.dtype=bfloat16", "train.mixed_precision=fp16", "train.device=auto"],
            "train.mixed_precision must be no or bf16 with model.dtype bfloat16, not fp16",
        ),
        (["model.block_swap=4"], "model.block_swap needs train.gradient_checkpointing"),
        (["model.quantize={kind: nf4}", "adapter.init=pissa"], "model.quantize is set with init: pissa"),
        (["profile=8gb", "adapter.init=pissa"], "profile 8gb: model.block_swap is set with init: pissa"),
        (["model.quantize={kind: int8, skip: ['(']}"], "model.quantize.skip.0 must be a regular expression"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_said(tmp_path: Path, overrides: list[str], said: str) -> None:
    assert said in "\n".join(problems(written(tmp_path, GOOD), *FROZEN, *overrides))
