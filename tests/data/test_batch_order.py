"""The order of batches: the same shared out or resumed, with every picture as often as it should be."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
from ranks import ranks
from taken_batches import PRIOR, Folder, Make, equal, steps

from finetune.data import prepare


@pytest.mark.parametrize("prior", [{"kind": "none"}, PRIOR, PRIOR | {"layout": "mixed"}, {"kind": "model"}])
def test_one_two_and_four_processes_take_the_same_steps(
    prior: dict[str, Any], make_recipe: Make, folder: Folder, fake: Any
) -> None:
    photos, taken = folder(5), []
    for world, batch, accumulation in ((1, 8, 1), (2, 4, 1), (4, 2, 1), (2, 2, 2), (1, 1, 8)):
        train = {"batch_size": batch, "gradient_accumulation_steps": accumulation}
        recipe = make_recipe(photos, train=train, prior=prior, data={"flip": True, "caption_dropout": 0.2})
        shares = [prepare(recipe, fake(), processes) for processes in ranks(world)]
        samples = []
        for step in range(6):
            parts = [part for share in shares for part in steps(share, step, 1)[0]]
            rows = [row for part in parts for row in zip(part.draws, part.ids, part.captions, strict=True)]
            samples.append(sorted(rows))
        taken.append(samples)
    assert all(other == taken[0] for other in taken[1:])


@pytest.mark.parametrize("first", [0, 1, 3, 50])
def test_any_step_can_be_begun_at(first: int, make_recipe: Make, folder: Folder, fake: Any) -> None:
    train = {"batch_size": 2, "gradient_accumulation_steps": 3}
    recipe = make_recipe(folder(5), train=train, prior=PRIOR, data={"flip": True, "caption_dropout": 0.2})
    uninterrupted = steps(prepare(recipe, fake()), 0, first + 2)[first:]
    resumed = steps(prepare(recipe, fake()), first, 2)
    assert all(
        equal(*pair) for one, other in zip(uninterrupted, resumed, strict=True) for pair in zip(one, other, strict=True)
    )


def test_mixed_batches_are_balanced_over_an_epoch(make_recipe: Make, folder: Folder, fake: Any) -> None:
    recipe = make_recipe(folder(5), train={"batch_size": 2}, prior=PRIOR | {"layout": "mixed"})
    batches = list(itertools.islice(prepare(recipe, fake()), 30))  # six epochs of five and five
    assert {len(batch) for batch in batches} == {2}
    drawn = Counter(id for batch in batches for id in batch.ids)
    assert [drawn[f"0/{index}.png"] for index in range(5)] == [6] * 5
    assert [drawn[f"class: a star/0000{index}.png"] for index in range(6)] == [5] * 6


def test_repeats_and_weights_of_concepts(make_recipe: Make, folder: Folder, fake: Any) -> None:
    recipe = make_recipe(folder(2), folder(3, "more"), train={"batch_size": 4}, prior=PRIOR)
    first, second = recipe.data.concepts
    concepts = [first.model_copy(update={"repeats": 3, "weight": 2.0}), second]
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"concepts": concepts})})
    batches = prepare(recipe, fake())
    assert batches.describe()["draws_per_epoch"] == 9
    drawn = Counter()
    for batch in itertools.islice(batches, 9):  # four epochs
        drawn.update(batch.ids[:4])
        for name, weight, prior in zip(batch.ids, batch.weight, batch.prior, strict=True):
            assert weight == (2.0 if name.startswith("0/") else 1.0)
            assert prior == name.startswith("class")
    assert drawn == {"0/0.png": 12, "0/1.png": 12, "1/0.png": 4, "1/1.png": 4, "1/2.png": 4}


@pytest.mark.parametrize("prior", [{"kind": "none"}, PRIOR, PRIOR | {"layout": "mixed"}])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_balanced_counts_are_exact_over_an_epoch_for_any_number_of_processes(
    world: int, prior: dict[str, Any], make_recipe: Make, folder: Folder, fake: Any
) -> None:
    recipe = make_recipe(folder(2), folder(6, "more"), data={"balance": True}, prior=prior)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_size": 12 // world})})
    shares = [prepare(recipe, fake(), processes) for processes in ranks(world)]
    assert shares[0].describe()["draws_per_epoch"] == 12
    epochs = 4 if prior.get("layout") == "mixed" else 2  # half of a mixed step are class pictures
    drawn = Counter(name for share in shares for step in steps(share, 0, epochs) for name in step[0].ids)
    own = {name: count for name, count in drawn.items() if not name.startswith("class")}
    assert own == {f"0/{index}.png": 6 for index in range(2)} | {f"1/{index}.png": 2 for index in range(6)}


def test_balanced_batches_can_be_begun_at_any_step(make_recipe: Make, folder: Folder, fake: Any) -> None:
    recipe = make_recipe(folder(2), folder(5, "more"), data={"balance": True}, train={"batch_size": 3})
    whole = steps(prepare(recipe, fake()), 0, 9)
    assert all(
        equal(one[0], other[0]) for one, other in zip(whole[7:], steps(prepare(recipe, fake()), 7, 2), strict=True)
    )
