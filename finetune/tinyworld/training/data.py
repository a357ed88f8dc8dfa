"""The training set in memory-mapped arrays: pictures, masks and factors, drawn once."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.tinyworld.subject import training_subject
from finetune.tinyworld.world import FACTORS, Scene, render_arrays

BYTES = NDArray[np.uint8]
SCENES, INDIVIDUALS = (1, 40_000), (2, 16_000)
"""Seed and number of the training pictures: plain scenes, and pairs of pictures of one individual each."""


@dataclass(frozen=True)
class Pictures:
    """``pictures`` uint8 (N, 64, 64, 3), ``masks`` uint8 (N, 64, 64), ``factors`` int64 (N, 6) as in ``FACTORS``.

    Two pictures in a row show one individual where ``individuals`` is True for the set.
    """

    pictures: BYTES
    masks: BYTES
    factors: NDArray[np.int64]
    individuals: bool

    def __len__(self) -> int:
        return len(self.pictures)


def scene_of(seed: int, index: int, individuals: bool) -> Scene:
    """Scene ``index``; of individuals it has the shape of the individual that the picture shows."""
    drawn = Scene.draw(seed, index)
    if not individuals:
        return drawn
    from dataclasses import replace

    return replace(drawn, shape=training_subject(seed, index // 2).shape)


def _draw(task: tuple[int, int, int, bool]) -> tuple[BYTES, BYTES, NDArray[np.int64]]:
    seed, start, stop, individuals = task
    scenes = [scene_of(seed, index, individuals) for index in range(start, stop)]
    drawn = [
        training_subject(seed, index // 2).render_arrays(scene) if individuals else render_arrays(scene)
        for index, scene in zip(range(start, stop), scenes, strict=True)
    ]
    return (
        np.stack([picture for picture, _ in drawn]),
        np.stack([mask for _, mask in drawn]),
        np.array([scene.indices for scene in scenes]),
    )


def load(folder: Path, seed: int, count: int, *, individuals: bool = False) -> Pictures:
    """The first ``count`` scenes of ``seed``, drawn on the first call and read from ``folder`` afterwards."""
    name = f"{'individuals' if individuals else 'scenes'}-{seed}-{count}"
    paths = [folder / f"{name}-{part}.npy" for part in ("pictures", "masks", "factors")]
    if not all(path.exists() for path in paths):
        folder.mkdir(parents=True, exist_ok=True)
        tasks = [(seed, start, min(start + 500, count), individuals) for start in range(0, count, 500)]
        with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
            parts = list(pool.map(_draw, tasks))
        for path, part in zip(paths, zip(*parts, strict=True), strict=True):
            part_path = path.with_suffix(".part.npy")
            np.save(part_path, np.concatenate(part))
            part_path.replace(path)
    pictures, masks, factors = (np.load(path, mmap_mode="r") for path in paths)
    return Pictures(pictures, masks, factors, individuals)


def training_scenes(folder: Path) -> Pictures:
    """The captioned world: what every stage learns from."""
    return load(folder, *SCENES)


def training_individuals(folder: Path) -> Pictures:
    """Two pictures each of random individuals: for the judge and the autoencoder, never for the denoiser."""
    return load(folder, *INDIVIDUALS, individuals=True)


def named_factors(row: NDArray[np.int64]) -> dict[str, str]:
    """Indices of one row of ``factors`` as words."""
    return {name: values[int(row[at])] for at, (name, values) in enumerate(FACTORS.items())}
