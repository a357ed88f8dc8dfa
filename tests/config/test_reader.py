"""Recipes as files: every mistake is reported with its place, and what is right comes out typed."""

from __future__ import annotations

import copy
import random
import re
from pathlib import Path

import pytest
import yaml

from finetune.config import Recipe, RecipeError, lock, read_recipe
from finetune.config.document import dump
from finetune.errors import UserError

KINDS = "lora, lokr, loha, oft, full, embedding, hypernetwork, aesthetic, pivotal"
GOOD = """\
recipe: dreambooth
output: runs/star
adapter:
  kind: lora
  rank: 4
data:
  resolution: 64
  concepts:
  - folder: pictures
    prompt: a photo of zib star
    trigger: zib
    class_prompt: a photo of a star
prior: {kind: images, count: 8}
train:
  steps: 20
  learning_rate: 1e-3
"""

PLAIN = yaml.safe_load(GOOD)


def written(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    """What is wrong, with the folder left out of the places."""
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, overrides)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return [problem.replace(f"{path.parent}/", "") for problem in caught.value.problems]


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
            "recipe.yaml:9: data.concepts.0.folder is missing: Pictures",
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
            "export.formats must hold diffusers or delta: the adapter is 'full'",
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


ODD = (
    None,
    True,
    -1,
    0,
    3,
    2.5,
    1e300,
    float("nan"),
    "",
    "x",
    "\u2028",
    "a" * 300,
    [],
    [1],
    {},
    {"kind": "lora"},
    [[]],
)


def mutated(rng: random.Random) -> dict:
    """A good recipe with one to three random changes anywhere in it."""
    tree = copy.deepcopy(PLAIN)
    for _ in range(rng.randint(1, 3)):
        node, chosen = tree, tree
        while isinstance(chosen, dict | list) and chosen and rng.random() < 0.8:
            node, keys = chosen, list(chosen) if isinstance(chosen, dict) else list(range(len(chosen)))
            key = rng.choice(keys)
            chosen = node[key]
        where = rng.choice(list(node) if isinstance(node, dict) else list(range(len(node))) or [0]) if node else None
        match rng.randrange(4):
            case 0 if isinstance(node, dict):
                node[rng.choice(["kind", "steps", "rnak", "extends", "\u00e9", "0", "", "<<", "folder"])] = rng.choice(
                    ODD
                )
            case 1 if node:
                del node[where]
            case 2 if isinstance(node, dict) and node:
                node[str(where)[::-1]] = node.pop(where)
            case _ if node:
                node[where] = copy.deepcopy(rng.choice(ODD))
    return tree


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
