"""Pictures of several sizes in one batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from finetune.batch import Batch, Posterior

TALL, WIDE = (4, 2), (2, 4)


def batch(*sizes: tuple[int, int], agree: Callable[[int], int] | None = None) -> Batch:
    """One sample of each size, whose latents are all its place in the batch."""
    count = len(sizes)
    latents = torch.arange(float(count)).view(count, 1, 1, 1).expand(count, 1, 4, 4)
    return Batch(
        ids=tuple(f"{place}.png" for place in range(count)),
        draws=tuple(range(count)),
        captions=("",) * count,
        posterior=Posterior(mean=latents, logvar=torch.zeros_like(latents)),
        prior=torch.zeros(count, dtype=torch.bool),
        weight=torch.ones(count),
        geometry=torch.zeros(count, 6, dtype=torch.int64),
        sizes=sizes,
        agree=agree,
    )


def test_rows_stand_in_the_batchs_order_whatever_was_run_together() -> None:
    seen: list[tuple[int, ...]] = []

    def each(part: Batch) -> Tensor:
        seen.append(tuple(part.posterior.mean.shape))
        return part.posterior.mean[:, 0, 0, 0]

    assert batch(TALL, WIDE, TALL).by_size(each).tolist() == [0, 1, 2]
    assert seen == [(2, 1, *TALL), (1, 1, *WIDE)]


@pytest.mark.parametrize(("sizes", "own"), [((TALL, TALL), 1), ((TALL, WIDE), 2)])
def test_processes_agree_before_any_of_them_runs(sizes: tuple[tuple[int, int], ...], own: int) -> None:
    """A pass that waits for the other processes would else wait for one that waits for this one's number."""
    done: list[str] = []

    def agree(passes: int) -> int:
        done.append(f"asks with {passes}")
        return 3

    def each(part: Batch) -> Tensor:
        done.append("runs")
        return factor * part.posterior.mean[:, 0, 0, 0]

    factor = torch.ones((), requires_grad=True)
    rows = batch(*sizes, agree=agree).by_size(each)
    assert done == [f"asks with {own}", *["runs"] * 3]
    assert rows.tolist() == [0, 1], "what is run again counts for nothing"
    rows.sum().backward()
    assert factor.grad == 1
