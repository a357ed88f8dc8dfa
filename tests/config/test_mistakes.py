"""Mistakes in a recipe: each has its sentence and its place, and all are told at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from written_recipes import GOOD, KINDS, problems, written

from finetune.config import Recipe, read_recipe


def test_a_good_recipe_comes_out_typed(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, GOOD))
    assert isinstance(recipe, Recipe)
    assert recipe.adapter.kind == "lora" and recipe.adapter.rank == 4
    assert recipe.train.learning_rate == 1e-3
    assert recipe.train.optimizer.betas == (0.9, 0.999)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("rank: 4", "rank: sixteen", "recipe.yaml:5: adapter.rank must be a positive integer, not 'sixteen'"),
        ("rank: 4", "rank: 0", "recipe.yaml:5: adapter.rank must be a positive integer, not 0"),
        ("rank: 4", "rank: 4.0", "recipe.yaml:5: adapter.rank must be a positive integer, not 4.0"),
        ("rank: 4", "rank: true", "recipe.yaml:5: adapter.rank must be a positive integer, not true"),
        ("rank: 4", "rank:", "recipe.yaml:5: adapter.rank must be a positive integer, not nothing"),
        ("rank: 4", "rnak: 4", "recipe.yaml:5: adapter.rnak is not a key; did you mean 'rank'?"),
        ("rank: 4", "lr: 4", "recipe.yaml:5: adapter.lr is not a key; did you mean 'train.learning_rate'?"),
        (
            "rank: 4",
            "steps: 4",
            "adapter.steps is not a key of kind 'lora'; `steps` belongs to kind 'aesthetic' or to `",
        ),
        ("rank: 4", "learning_rate: 4", "`learning_rate` belongs to kind 'aesthetic' or to `train`"),
        ("rank: 4", "select: all", "adapter.select is not a key of kind 'lora'; `select` belongs to kind 'full'"),
        ("rank: 4", "zzz: 4", "adapter.zzz is not a key; known: alpha, dropout,"),
        ("rank: 4", "targets: [3]", "recipe.yaml:5: adapter.targets.0 must be text, not 3; put it in quotes"),
        ("rank: 4", "targets: 3", "adapter.targets must be text or a list of texts, at least one, not 3"),
        ("rank: 4", "targets: []", "adapter.targets must be text or a list of texts, at least one, not an empty list"),
        ("rank: 4", "targets: ['(']", "adapter.targets.0 must be a regular expression, not '('"),
        (
            "kind: lora",
            "kind: lokra",
            f"recipe.yaml:4: adapter.kind must be one of {KINDS}, not 'lokra'",
        ),
        (
            "kind: lora",
            "rank: 5",
            f"recipe.yaml:3: adapter.kind is missing; one of {KINDS}",
        ),
        (
            "adapter:\n  kind: lora\n  rank: 4",
            "adapter: lora",
            f"adapter must be a section with `kind` ({KINDS}), not",
        ),
        ("recipe: dreambooth", "recipe: dreamboth", "recipe must be one of dreambooth, lora, full, textual_inversion"),
        ("output: runs/star", "", "recipe.yaml:1: output is missing: Folder of the run"),
        ("output: runs/star", "output: ''", "recipe.yaml:2: output must be text, not an empty one"),
        ("output: runs/star", "output: 5", "recipe.yaml:2: output must be text, not 5; put it in quotes"),
        (
            "  - folder: pictures\n    prompt",
            "  - prompt",
            "recipe.yaml:9: data.concepts.0.folder is missing: pictures come from a folder",
        ),
        ("learning_rate: 1e-3", "learning_rate: .nan", "learning_rate must be a positive number, not nan"),
        ("learning_rate: 1e-3", "learning_rate: .inf", "learning_rate must be a positive number, not inf"),
        ("learning_rate: 1e-3", "learning_rate: '1e-3'", "learning_rate must be a positive number, not '1e-3'"),
        (
            "learning_rate: 1e-3",
            "optimizer: {betas: [1, 2]}",
            "betas must be a list of 2, each a number from 0 to below 1, not [1, 2]",
        ),
        ("learning_rate: 1e-3", "optimizer: {betas: [0.9]}", "betas must be a list of 2, each a number from 0 to"),
        ("learning_rate: 1e-3", "ema: {decay: 1.0}", "train.ema.decay must be a number from 0 to below 1, not 1.0"),
        ("learning_rate: 1e-3", "flip: yes", "train.flip is not a key; `flip` belongs to `data`"),
        ("learning_rate: 1e-3", "gradient_checkpointing: yes", "must be true or false, not 'yes'"),
        (
            "learning_rate: 1e-3",
            "schedule: {warmup_steps: 21}",
            "warmup_steps must be at most train.steps, which is 20",
        ),
        ("learning_rate: 1e-3", "{a: 1}", "recipe.yaml:17: is not YAML"),
    ],
)
def test_each_mistake_has_its_sentence(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in GOOD
    assert any(said in problem for problem in problems(written(tmp_path, GOOD.replace(old, new))))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["data.concepts.0.class_prompt=a zib star"], "must not contain the trigger 'zib': it names the class"),
        (["data.concepts.0.class_prompt=a Zib star"], "must not contain the trigger"),
        (["data.concepts.0.class_prompt=null"], "class_prompt is missing: prior 'images' preserves"),
        (["data.concepts.0.prompt=a photo of a star"], "prompt must contain the trigger 'zib'"),
        (["data.concepts.0.prompt=a photo of zibby star"], "prompt must contain the trigger 'zib'"),
        (["data.concepts.0.trigger=null"], "trigger is missing: DreamBooth"),
        (["data.concepts.0.prompt=null"], "prompt is missing: DreamBooth"),
        (
            [
                *("recipe=aesthetic", "adapter={kind: aesthetic}", "report={enabled: false}"),
                *("train.steps=1000", "train.learning_rate=1e-4"),
            ],
            "prior.kind must be none: an aesthetic embedding trains no weights",
        ),
        (["recipe=full", "prior.kind=none"], "adapter.kind must be full in the recipe 'full'"),
        (["adapter.text_encoder_learning_rate=1e-5"], "is set, but text_encoder is false"),
        (
            ["adapter.kind=full", "export.formats=[kohya]"],
            "export.formats must hold diffusers or delta or single-file: the adapter is 'full'",
        ),
        (["export.formats=[kohya, kohya]"], "must name each format once"),
        (["train.device=cpu", "train.mixed_precision=fp16"], "must be no or bf16 on the CPU"),
        (["prior.folder=pictures"], "holds the subject's pictures"),
        (["data.balance=true", "data.concepts.0.repeats=3"], "data.concepts.0.repeats must be 1 with data.balance"),
        (["recipe=lora", "prior.kind=none", "data.concepts=[{folder: a, captions: prompt}]"], "concept has no prompt"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path: Path, changes: list[str], said: str) -> None:
    found = problems(written(tmp_path, GOOD), *changes)
    assert len(found) == 1
    assert said in found[0]


def test_a_contradiction_names_the_line_of_its_key_or_of_what_lacks_it(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD.replace("a photo of a star", "a zib star"))
    assert problems(path)[0].startswith("recipe.yaml:12: data.concepts.0.class_prompt must not contain")
    path = written(tmp_path, GOOD.replace("    class_prompt: a photo of a star\n", ""))
    assert problems(path)[0].startswith("recipe.yaml:9: data.concepts.0.class_prompt is missing")


def test_the_embedded_world_brings_its_own_prompts(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, GOOD), ["data.concepts=[{folder: 'tinyworld:subject/7'}]"])
    assert recipe.data.concepts[0].prompt is None


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = (
        GOOD.replace("rank: 4", "rank: x").replace("steps: 20", "stpes: 20\n  steps: 2.5").replace("output", "outptu")
    )
    lines = [int(problem.split(":")[1]) for problem in problems(written(tmp_path, text))]
    assert lines == [1, 2, 5, 15, 16]
