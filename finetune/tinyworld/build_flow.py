"""Rebuild the flow-matching base: latents and prompts by the shipped autoencoder and text encoder, denoiser, export.

Stages are passed over and resumed as in ``finetune.tinyworld.build``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from finetune.tinyworld import BASE
from finetune.tinyworld.build import SEED, checked_size, machine, run

STEPS, BATCH = 12_000, 64
"""Of the shipped files: steps of the denoiser, and pictures in each."""


def stages(work: Path, steps: int) -> dict[str, Callable[[], None]]:
    """What there is to do, in order."""
    from finetune.tinyworld.training import data, flow, latents, prompts
    from finetune.tinyworld.training.fit import in_workers

    def pictures() -> None:
        data.training_scenes(work / "data")

    return {
        "data": pictures,
        "flow-latents": lambda: latents.encode(work / "flow-latents", BASE / "vae"),
        "flow-prompts": lambda: prompts.encode(work / "flow-prompts"),
        "flow": lambda: in_workers(flow.train, 1, work / "flow", steps, BATCH, SEED),
    }


def build(work: Path, out: Path, steps: int = STEPS, say: Callable[[str], None] = print) -> dict[str, float]:
    """Train what is not trained yet in ``work`` and write ``out/base-flow``.

    Returns:
        Minutes that each stage took, over all interrupted runs.
    """
    from finetune.tinyworld.training import card, export

    minutes = run(stages(work, steps), work, say)
    export.save_flow(work / "flow" / "model", out / "base-flow")
    said = f"{steps} of {BATCH} pictures"
    card.write(out, card.FLOW, ("base-flow",), seed=SEED, steps=said, machine=machine(), minutes=minutes)
    checked_size(out)
    return minutes
