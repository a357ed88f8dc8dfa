"""Pictures along the way."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.family import ModelFamily
from finetune.files import replacing
from finetune.sampling import draw
from finetune.train.trainer import Trainer


def preview(trainer: Trainer, family: ModelFamily, prompts: Sequence[str]) -> None:
    """Draw ``prompts`` with the weights that would be exported now. Every process must call it.

    Writes ``samples/step-000200/<prompt>-<picture>.png`` and shows them in tensorboard. The noise of a picture is the
    same at every step.
    """
    config, side = trainer.recipe.samples, trainer.recipe.data.resolution
    with trainer.averaged():
        pictures = draw(
            family, prompts, config.per_prompt, config.sampler, trainer.recipe.seed, trainer.processes, side
        )
    names = [f"{number}-{copy}" for number in range(len(prompts)) for copy in range(config.per_prompt)]
    named = dict(zip(names, pictures, strict=True))
    trainer.log.pictures(trainer.step, {f"samples/{name}": picture for name, picture in named.items()})
    if trainer.processes.is_main:
        for name, picture in named.items():
            with replacing(trainer.folder.samples / f"step-{trainer.step:06d}" / f"{name}.png") as path:
                picture.save(path, format="PNG")
