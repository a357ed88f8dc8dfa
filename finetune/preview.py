"""Pictures along the way, drawn as the exported adapter will draw them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

from finetune.export.sample import as_exported
from finetune.family import ModelFamily
from finetune.files import replacing
from finetune.sampling import draw
from finetune.train import Trainer


def preview(trainer: Trainer, family: ModelFamily, prompts: Sequence[str]) -> None:
    """Draw ``prompts`` with what would be exported now. Every process must call it.

    The pictures are, bit for bit, those of ``finetune sample`` with the files of a run that ended here: what was
    trained is written in the layout and the numbers that are exported, and loaded again by its readers' loader into
    another pipeline around the same base. What trains is only read.

    Writes ``samples/step-000200/<prompt>-<picture>.png`` and shows them in tensorboard. The noise of a picture is the
    same at every step.
    """
    per_prompt = trainer.recipe.samples.per_prompt
    names = [f"{number}-{copy}" for number in range(len(prompts)) for copy in range(per_prompt)]
    named = dict(zip(names, _drawn(trainer, family, prompts), strict=True))
    trainer.log.pictures(trainer.step, {f"samples/{name}": picture for name, picture in named.items()})
    if trainer.processes.is_main:
        for name, picture in named.items():
            with replacing(trainer.folder.samples / f"step-{trainer.step:06d}" / f"{name}.png") as path:
                picture.save(path, format="PNG")


def _drawn(trainer: Trainer, family: ModelFamily, prompts: Sequence[str]) -> list[Image.Image]:
    recipe, config = trainer.recipe, trainer.recipe.samples
    with trainer.averaged(), TemporaryDirectory(prefix="finetune-preview-") as folder, torch.random.fork_rng():
        parts = [part.weights() for part in trainer.adapter.parts()]
        twin = family.twin(trainer.adapter.set_aside())
        drawn = as_exported(parts, twin, recipe, Path(folder), config.strength)
        side = recipe.data.resolution
        return draw(drawn, prompts, config.per_prompt, config.sampler, recipe.seed, trainer.processes, side)
