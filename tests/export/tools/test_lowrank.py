"""Ranks and factors against the singular values of whole matrices."""

from __future__ import annotations

import pytest
import torch

from finetune.errors import UserError
from finetune.export.layers import Layer
from finetune.export.tools.lowrank import Rule, cut, recut, total_kept
from finetune.randomness import generator

VALUES = torch.tensor([8.0, 4.0, 2.0, 1.0])  # squares 64, 16, 4, 1, of 85 together; sum 15


@pytest.mark.parametrize(
    ("asked", "rank"),
    [
        ({"rank": 2}, 2),
        ({"rank": 9}, 4),
        ({"energy": 64 / 85}, 1),
        ({"energy": 64 / 85 + 1e-6}, 2),
        ({"energy": 1.0}, 4),
        ({"frobenius": (80 / 85) ** 0.5}, 2),
        ({"frobenius": (80 / 85) ** 0.5 + 1e-6}, 3),
        ({"cumulative": 12 / 15}, 2),
        ({"cumulative": 12 / 15 + 1e-6}, 3),
        ({"ratio": 4.0}, 3),
        ({"ratio": 3.9}, 2),
        ({"ratio": 8.0, "rank": 2}, 2),
        ({"energy": 0.01}, 1),
    ],
)
def test_the_fewest_that_fulfil_what_is_asked(asked, rank):
    assert Rule(**asked).choose(VALUES) == rank


def test_values_of_nothing_are_not_kept():
    assert Rule(rank=4).choose(torch.tensor([3.0, 1.0, 1e-9, 0.0])) == 2
    assert Rule(energy=1.0).choose(torch.zeros(4)) == 1


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "say a rank"),
        ({"energy": 0.5, "ratio": 2.0}, "energy and ratio each choose"),
        ({"rank": 0}, "at least 1"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"ratio": 0.5}, "ratio is 0.5"),
    ],
)
def test_rules_that_mean_nothing(asked, words):
    with pytest.raises(UserError, match=words):
        Rule(**asked)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 5, 3, 3), (12, 20, 1, 1)])
def test_a_cut_is_the_nearest_of_its_rank(shape):
    """Eckart and Young: the error is what the cut off singular values add up to."""
    change = torch.randn(shape, generator=generator(0, "change"))
    values = torch.linalg.svdvals(change.flatten(1).double())
    found = cut("denoiser", "x", change, Rule(rank=5))
    assert found.layer.down.shape == (5, *shape[1:]) and found.layer.up.shape[:2] == (shape[0], 5)
    error = (found.layer.delta() - change).double().square().sum()
    torch.testing.assert_close(error, values[5:].square().sum(), rtol=1e-5, atol=1e-9)
    assert found.kept == pytest.approx(float(values[:5].square().sum() / values.square().sum()), rel=1e-5)
    assert found.squares == pytest.approx(float(values.square().sum()), rel=1e-5)
    assert torch.equal(cut("denoiser", "x", change, Rule(rank=5)).layer.up, found.layer.up)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_small_values_beside_large_ones_are_right(shape):
    """Squaring a matrix must not lose what float32 holds: values down to a millionth of the largest."""
    u, _, v = torch.linalg.svd(
        torch.randn(shape, generator=generator(2, "c"), dtype=torch.float64), full_matrices=False
    )
    values = torch.logspace(0, -6, 12, dtype=torch.float64)
    change = (u * values @ v).float()
    found = cut("denoiser", "x", change, Rule(rank=12))
    torch.testing.assert_close(found.layer.delta(), change, rtol=0, atol=2e-7)
    assert found.layer.rank == 12


def test_no_change_is_no_nan():
    found = cut("denoiser", "x", torch.zeros(4, 6), Rule(rank=2))
    assert found.layer.rank == 1 and not found.layer.delta().any() and found.kept == 1.0


@pytest.mark.parametrize("convolution", [False, True])
def test_factors_are_cut_like_their_product(convolution):
    draw = generator(1, "factors")
    down = torch.randn(6, 7, *[3] * (2 * convolution), generator=draw)
    up = torch.randn(10, 6, *[1] * (2 * convolution), generator=draw)
    layer = Layer(network="denoiser", module="x", down=down, up=up, alpha=3.0)
    for rank in (1, 4, 6):
        one, two = recut(layer, Rule(rank=rank)), cut("denoiser", "x", layer.delta(), Rule(rank=rank))
        torch.testing.assert_close(one.layer.delta(), two.layer.delta(), rtol=1e-4, atol=1e-5)
        assert one.kept == pytest.approx(two.kept, rel=1e-5)
    torch.testing.assert_close(recut(layer, Rule(rank=6)).layer.delta(), layer.delta(), rtol=1e-5, atol=1e-6)
    assert recut(layer, Rule(rank=64)).layer.rank == 6, "a rank that is not there is not made"


def test_what_is_kept_of_several_layers_counts_by_their_size():
    assert total_kept([(1.0, 3.0), (0.5, 1.0)]) == pytest.approx(3.5 / 4)
    assert total_kept([]) == 1.0
