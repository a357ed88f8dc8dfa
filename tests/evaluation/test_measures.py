"""The measures have closed forms on hand-made embeddings, and depend on nothing that they should not depend on."""

import math

import pytest
import torch

from finetune.evaluation.measures import accuracy, bootstrap, diversity, normalised, similarity


def embeddings(count: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))


def test_similarity_of_known_angles() -> None:
    east, north = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    diagonal = torch.tensor([[3.0, 3.0]])
    assert similarity(east, east) == pytest.approx(1.0)
    assert similarity(east, north) == pytest.approx(0.0)
    assert similarity(east, diagonal) == pytest.approx(math.sqrt(0.5))
    assert similarity(torch.cat([east, north]), east) == pytest.approx(0.5)


def test_similarity_and_diversity_do_not_depend_on_order_or_length() -> None:
    first, second = embeddings(6, 0), embeddings(5, 1)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert similarity(first[order], second) == pytest.approx(similarity(first, second), abs=1e-12)
    assert diversity(first[order]) == pytest.approx(diversity(first), abs=1e-12)
    assert diversity(7 * first) == pytest.approx(diversity(first), abs=1e-6)


def test_a_generator_that_always_draws_the_same_has_no_diversity() -> None:
    assert diversity(embeddings(1).expand(8, -1)) == 0.0


def test_diversity_counts_every_pair_once() -> None:
    axes = torch.eye(4)
    assert diversity(axes) == pytest.approx(1.0)
    assert diversity(torch.cat([axes[:2], axes[:1]])) == pytest.approx(2 / 3)


def test_sets_that_are_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match="two pictures"):
        diversity(embeddings(1))
    with pytest.raises(ValueError, match="empty"):
        similarity(embeddings(0), embeddings(2))


def test_normalised_is_0_at_the_floor_and_1_at_the_ceiling() -> None:
    assert normalised(0.1, 0.1, 0.6) == 0
    assert normalised(0.6, 0.1, 0.6) == 1
    assert normalised(0.35, 0.1, 0.6) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="not above the floor"):
        normalised(0.3, 0.6, 0.6)


def test_accuracy_counts_only_what_a_prompt_names() -> None:
    read = [{"shape": "star", "colour": "red", "background": "on snow"}] * 2
    asked = [{"shape": "star", "background": "on snow"}, {"shape": "ring"}]
    assert accuracy(asked, read) == {"shape": 0.5, "background": 1.0}


def test_intervals_are_the_same_in_every_run_and_hold_the_mean() -> None:
    values = [0.5, 0.7, 0.6, 0.9, 0.3]
    first = bootstrap(values)
    assert first == bootstrap(values)
    assert first.mean == pytest.approx(0.6)
    assert first.low < first.mean < first.high
    assert min(values) <= first.low and first.high <= max(values)
    assert bootstrap(values, seed=1).mean == first.mean


def test_an_interval_of_equal_values_has_no_width() -> None:
    one = bootstrap([0.25, 0.25, 0.25])
    assert (one.low, one.mean, one.high) == (0.25, 0.25, 0.25)


def test_interval_width_follows_the_standard_error() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(3)).tolist()
    one = bootstrap(values)
    assert one.high - one.low == pytest.approx(2 * 1.96 / math.sqrt(400), rel=0.15)
