"""Rebuild the flow-matching base: latents and prompts by the shipped autoencoder and text encoder, denoiser, export.

Stages are passed over and resumed as in ``finetune.tinyworld.build``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune.tinyworld import BASE
from finetune.tinyworld.build import SEED, checked_size, machine, run


@dataclass(frozen=True, slots=True)
class Budget:
    """Steps of the denoiser's two stages and pictures in each; the defaults are those of the shipped files."""

    flow: int = 12_000
    flow_late: int = 4_000
    batch: int = 64

    def scaled(self, scale: float) -> Budget:
        """Both stages ``scale`` times as long."""
        return Budget(max(1, round(self.flow * scale)), max(1, round(self.flow_late * scale)), self.batch)


def stages(work: Path, budget: Budget) -> dict[str, Callable[[], None]]:
    """What there is to do, in order."""
    from finetune.tinyworld.training import data, flow, latents, prompts
    from finetune.tinyworld.training.fit import in_workers

    def pictures() -> None:
        data.training_scenes(work / "data")

    def stage(name: str, *arguments: object) -> Callable[[], None]:
        return lambda: in_workers(flow.train, 1, work / name, *arguments)

    return {
        "data": pictures,
        "flow-latents": lambda: latents.encode(work / "flow-latents", BASE / "vae"),
        "flow-prompts": lambda: prompts.encode(work / "flow-prompts"),
        "flow": stage("flow", budget.flow, budget.batch, SEED),
        "flow-late": stage("flow-late", budget.flow_late, budget.batch, SEED + 1, "flow", 0.3),
    }


def build(work: Path, out: Path, budget: Budget, say: Callable[[str], None] = print) -> dict[str, float]:
    """Train what is not trained yet in ``work`` and write ``out/base-flow``.

    Returns:
        Minutes that each stage took, over all interrupted runs.
    """
    from finetune.tinyworld.training import card, export

    minutes = run(stages(work, budget), work, say)
    export.save_flow(work / "flow-late" / "model", out / "base-flow")
    steps = f"flow {budget.flow}, flow_late {budget.flow_late}, batch {budget.batch}"
    card.write(out, card.FLOW, ("base-flow",), seed=SEED, steps=steps, machine=machine(), minutes=minutes)
    checked_size(out)
    return minutes
