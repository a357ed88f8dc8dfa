"""Draws that are named and not counted."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from finetune.randomness import derive, generator, permutation


def test_same_name_same_draw_different_name_different_draw() -> None:
    assert torch.equal(
        torch.randn(5, generator=generator(0, "noise", "a", 3)), torch.randn(5, generator=generator(0, "noise", "a", 3))
    )
    names = [
        (seed, purpose, sample, draw)
        for seed in (0, 1)
        for purpose in ("noise", "time")
        for sample in "ab"
        for draw in range(50)
    ]
    assert len({derive(*name) for name in names}) == len(names)


def test_parts_do_not_run_together() -> None:
    assert derive(0, "ab", "c") != derive(0, "a", "bc")
    assert derive(0, 1) != derive(0, "1")
    assert derive(1, 2) != derive(12)


def test_seeds_fit_every_generator() -> None:
    assert all(0 <= derive(seed, "x") < 2**63 for seed in range(200))


def test_another_process_draws_the_same() -> None:
    """Python's own ``hash`` would differ: it is salted per process."""
    code = "from finetune.randomness import derive; print(derive(7, 'noise', 'böse/1.png', 3))"
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": salt},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for salt in ("1", "2")
    }
    assert said == {str(derive(7, "noise", "böse/1.png", 3))}


def test_the_global_generator_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    torch.randn(3, generator=generator(0, "x"))
    permutation(10, 0, "order")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_permutation_holds_every_number_once() -> None:
    first, second = permutation(100, 0, "order", 0), permutation(100, 0, "order", 1)
    assert sorted(first) == list(range(100))
    assert first != second
    assert first == permutation(100, 0, "order", 0)
    assert list(permutation(0, 0)) == []
