"""Textual inversion: find a new word for what a few pictures show, in a model that stays as it is.

    accelerate launch recipes/textual_inversion.py --config recipes/configs/textual-inversion-tiny.yaml

All that is learned is one or a few vectors in the text encoder's table, a file of some kilobytes. It can say only what
the model can draw already: more vectors hold more, weights (`recipes/dreambooth.py`, `recipes/pivotal.py`) hold most.

Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion", ICLR 2023,
https://arxiv.org/abs/2208.01618
"""

from torch import Tensor

from finetune.adapters import attach
from finetune.batch import Batch
from finetune.config import Recipe
from finetune.config.command import run
from finetune.data import prepare
from finetune.denoise import PriorLoss, training_loss
from finetune.distributed import start
from finetune.families import load_family
from finetune.finish import finish
from finetune.train import Trainer, check_run, preview


def main(recipe: Recipe) -> None:
    processes = start(recipe.train)
    check_run(recipe, processes)
    family = load_family(recipe.model, recipe.train.min_snr_gamma, processes.device)
    batches = prepare(recipe, family, processes)  # pictures alone: prompts are encoded anew in every step
    adapter = attach(recipe.adapter, family, recipe.seed)
    if recipe.train.gradient_checkpointing:
        family.enable_gradient_checkpointing()

    def loss(batch: Batch) -> PriorLoss | Tensor:
        return training_loss(family, adapter, batch, recipe)

    trainer = Trainer(recipe, processes, family.networks, adapter, loss)
    for batch in trainer.steps(batches):
        trainer.update(batch)
        if trainer.every(recipe.samples.every):
            preview(trainer, family, recipe.samples.prompts or batches.example_prompts)

    finish(trainer, family, batches)


if __name__ == "__main__":
    run(main)
