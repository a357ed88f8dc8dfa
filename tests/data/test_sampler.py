"""The order of draws: endless, whole, a pure function of the seed, and the same for any number of processes."""

from __future__ import annotations

from collections import Counter

import pytest

from finetune.data.sampler import Balanced, Fixed, Grouped, Mixed, Pairwise, Plain, Share, Shuffled


def test_every_place_once_per_epoch_and_epochs_differ() -> None:
    order = Shuffled(7, seed=3)
    epochs = [[order[7 * epoch + place] for place in range(7)] for epoch in range(20)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 15
    assert [Shuffled(7, seed=3)[n] for n in range(50)] == [order[n] for n in range(50)]
    assert [Shuffled(7, seed=4)[n] for n in range(50)] != [order[n] for n in range(50)]


def test_any_draw_can_be_begun_at() -> None:
    assert Shuffled(5, seed=0)[10**9] in range(5)


def test_repeats_are_draws_of_the_same_epoch() -> None:
    order = Plain(Fixed([0, 1, 2, 2, 2]), seed=0)
    for epoch in range(4):
        drawn = Counter(order.at(5 * epoch + place)[0].item for place in range(5))
        assert drawn == {0: 1, 1: 1, 2: 3}


@pytest.mark.parametrize(("world", "batch", "accumulation"), [(1, 8, 1), (2, 4, 1), (4, 2, 1), (2, 2, 2), (1, 1, 8)])
def test_a_step_has_the_same_draws_however_it_is_shared_out(world: int, batch: int, accumulation: int) -> None:
    shares = [Share(batch, accumulation, rank, world) for rank in range(world)]
    for step in (0, 1, 17):
        drawn = [number for part in range(accumulation) for share in shares for number in share.draws(step, part)]
        assert drawn == list(range(8 * step, 8 * step + 8))


def test_pairwise_has_a_class_picture_for_every_subject_picture() -> None:
    order = Pairwise(Fixed([0, 1, 2]), classes=5, seed=0)
    pairs = [order.at(number) for number in range(30)]
    assert all([one.prior for one in pair] == [False, True] for pair in pairs)
    for epoch in range(6):  # five class pictures: their epochs are longer than the subject's three
        assert sorted(pair[1].item for pair in pairs[5 * epoch : 5 * epoch + 5]) == list(range(5))
    subjects = [order.at(number)[0] for number in range(30)]
    assert subjects == [Plain(Fixed([0, 1, 2]), seed=0).at(number)[0] for number in range(30)]


def test_mixed_is_balanced_and_uses_every_class_picture() -> None:
    order = Mixed(Fixed([0, 1, 2]), classes=5, seed=0)
    drawn = [order.at(number)[0] for number in range(60)]
    for epoch in range(10):
        part = drawn[6 * epoch : 6 * epoch + 6]
        assert sorted(one.item for one in part if not one.prior) == [0, 1, 2]
        assert sum(one.prior for one in part) == 3
    assert Counter(one.item for one in drawn if one.prior) == dict.fromkeys(range(5), 6)


def test_mixed_with_few_class_pictures_repeats_them() -> None:
    drawn = [Mixed(Fixed([0, 1, 2, 3]), classes=1, seed=0).at(number)[0] for number in range(16)]
    assert sum(one.prior for one in drawn) == 8


def test_balanced_draws_every_concept_equally_often_and_each_of_its_pictures_in_turn() -> None:
    groups = [range(2), range(2, 7), range(7, 10)]
    order = Plain(Balanced(groups, seed=3), seed=3)
    assert len(order.items) == 15
    for epoch in range(8):
        drawn = [order.at(15 * epoch + place)[0].item for place in range(15)]
        assert [sum(item in group for item in drawn) for group in groups] == [5, 5, 5]
        assert sorted(item for item in drawn if item in groups[1]) == list(groups[1])
    counts = Counter(order.at(number)[0].item for number in range(15 * 6))
    assert [counts[item] for item in range(10)] == [15, 15, *[6] * 5, *[10] * 3]  # 30 draws for each concept


def test_balanced_is_a_function_of_seed_and_draw_alone() -> None:
    groups = [range(2), range(2, 7)]
    forward = [Plain(Balanced(groups, seed=3), seed=3).at(number) for number in range(60)]
    backward = [Plain(Balanced(groups, seed=3), seed=3).at(number) for number in reversed(range(60))]
    assert forward == backward[::-1]
    assert forward != [Plain(Balanced(groups, seed=4), seed=4).at(number) for number in range(60)]
    assert [one[0].item for one in forward[:10]] != [one[0].item for one in forward[10:20]]


@pytest.mark.parametrize("kind", [Pairwise, Mixed])
def test_balanced_holds_beside_class_pictures(kind: type[Pairwise] | type[Mixed]) -> None:
    items = Balanced([range(1), range(1, 5)], seed=0)
    order = kind(items, classes=3, seed=0)
    draws = 8 * (1 if kind is Pairwise else 2)  # of an epoch
    for epoch in range(4):
        drawn = [one for place in range(draws) for one in order.at(draws * epoch + place)]
        assert Counter(one.item for one in drawn if not one.prior) == {0: 4, 1: 1, 2: 1, 3: 1, 4: 1}
        assert sum(one.prior for one in drawn) == 8


SIZES = [(1, 1)] * 9 + [(2, 1)] * 6 + [(1, 2)] * 2  # of 17 places


def grouped(unit: int, seed: int = 3) -> Grouped:
    return Grouped(len(SIZES), unit, lambda _, place: SIZES[place], seed)


@pytest.mark.parametrize("unit", [1, 2, 4, 5, 16, 40])
def test_grouped_has_every_place_once_per_epoch(unit: int) -> None:
    order = grouped(unit)
    epochs = [[order[17 * epoch + place] for place in range(17)] for epoch in range(30)]
    assert all(sorted(epoch) == list(range(17)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 30
    assert [grouped(unit)[number] for number in (400, 3, 77)] == [order[400], order[3], order[77]]


@pytest.mark.parametrize("unit", [2, 4, 5])
def test_most_steps_of_a_grouped_order_have_one_size(unit: int) -> None:
    """At most one step more per size and epoch has several, however epochs and steps overlap."""
    order = grouped(unit)
    epochs = 20
    steps = [{SIZES[order[unit * step + i]] for i in range(unit)} for step in range(17 * epochs // unit)]
    mixed = sum(len(sizes) > 1 for sizes in steps)
    assert mixed <= epochs * 3
    shuffled = Shuffled(17, 3)
    apart = [{SIZES[shuffled[unit * step + i]] for i in range(unit)} for step in range(17 * epochs // unit)]
    assert mixed < sum(len(sizes) > 1 for sizes in apart) / 1.5


def test_mixed_keeps_its_shares_when_grouped() -> None:
    items = Fixed([0, 1, 2])
    plain = Mixed(items, classes=5, seed=0)
    order = Mixed(items, 5, 0, Grouped(6, 4, lambda epoch, place: (int(plain.placed(0, epoch, place).prior), 0), 0))
    drawn = [order.at(number)[0] for number in range(60)]
    assert Counter(one.item for one in drawn if one.prior) == dict.fromkeys(range(5), 6)
    assert all(sum(one.prior for one in drawn[6 * epoch : 6 * epoch + 6]) == 3 for epoch in range(10))
