"""Recipes as files, and what is said of them."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import yaml

from finetune.config import RecipeError, read_recipe

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
