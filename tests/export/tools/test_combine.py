"""The formulas of merging on one layer, against PEFT's and against numbers by hand."""

from __future__ import annotations

import pytest
import torch
from peft.utils.merge_utils import ties as ties_of_peft

from finetune.export.layers import Layer
from finetune.export.tools import combine
from finetune.randomness import generator


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed, "combine"))


def layers(*alphas: float) -> list[Layer]:
    return [
        Layer(network="denoiser", module="x", down=drawn(2 * i, 3, 8), up=drawn(2 * i + 1, 6, 3), alpha=alpha)
        for i, alpha in enumerate(alphas)
    ]


def test_concatenation_is_the_exact_sum():
    found, weights = layers(3.0, 1.5), (0.7, -2.0)
    joined = combine.concatenated(found, weights)
    assert joined.rank == 6 and joined.scale == 1.0
    wanted = sum(weight * layer.delta() for layer, weight in zip(found, weights, strict=True))
    torch.testing.assert_close(joined.delta(), wanted)


def test_added_factors_are_pefts_linear():
    found, weights = layers(3.0, 1.5), (0.7, -2.0)
    added = combine.added(found, weights)
    assert added.rank == 3 and added.scale == 1.0
    roots = [(abs(weight) * layer.scale) ** 0.5 for layer, weight in zip(found, weights, strict=True)]
    down = roots[0] * found[0].down - roots[1] * found[1].down
    up = roots[0] * found[0].up + roots[1] * found[1].up
    torch.testing.assert_close(added.delta(), up @ down)
    torch.testing.assert_close(combine.added(found[1:], (-2.0,)).delta(), -2.0 * found[1].delta())


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_ties_is_pefts_of_one_layer(density):
    """PEFT trims each layer for itself; with one layer that is the paper's share of the whole vector."""
    changes, weights = [drawn(i, 20, 10) for i in range(3)], [1.0, 1.0, 1.0]
    trimmed = [combine.trimmed(one, combine.threshold(lambda one=one: [one], density)) for one in changes]
    torch.testing.assert_close(combine.elected(trimmed, weights), ties_of_peft(changes, torch.tensor(weights), density))


def test_ties_by_hand():
    one, two, three = (torch.tensor(values) for values in ([4.0, -1.0, 0.0], [-1.0, -3.0, 0.0], [2.0, 5.0, 0.0]))
    assert combine.elected([one, two, three], [1.0, 1.0, 1.0]).tolist() == [3.0, 5.0, 0.0]
    assert combine.elected([one, two, three], [1.0, 4.0, 1.0]).tolist() == [3.0, -6.5, 0.0], "weights vote"


def test_the_threshold_is_that_of_all_layers_together():
    changes = [drawn(i, 30, 7) for i in range(4)]
    values = torch.cat([one.flatten() for one in changes]).abs().sort(descending=True).values
    for density in (0.001, 0.2, 0.77, 1.0):
        kept = max(1, round(density * len(values)))
        assert combine.threshold(lambda: changes, density) == values[kept - 1].item()


def test_dropped_numbers_are_named_draws_and_keep_the_mean():
    change = torch.ones(400, 500)
    found = combine.dropped(change, 0.9, 7, 0, "denoiser.x")
    assert found.unique().tolist() == pytest.approx([0.0, 10.0])
    assert found.mean() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(found, combine.dropped(change, 0.9, 7, 0, "denoiser.x"))
    for other in ((8, 0, "denoiser.x"), (7, 1, "denoiser.x"), (7, 0, "denoiser.y")):
        assert not torch.equal(found, combine.dropped(change, 0.9, *other))
    assert torch.equal(combine.dropped(change, 0.0, 7, 0, "x"), change)
