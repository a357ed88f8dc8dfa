"""Pivotal tuning: a new word and a LoRA, trained together.

    accelerate launch recipes/pivotal.py --config recipes/configs/pivotal-tiny.yaml
    accelerate launch recipes/pivotal.py --config recipes/configs/pivotal-two-phase-tiny.yaml

A LoRA alone has to tie a subject to a word that exists, and a word alone can only ask for what the model can draw. Here
the word learns first, or beside the LoRA, for a share of the steps: up to the pivot. Then it rests, bit for bit, and
the LoRA goes on. What comes out is two files, and one with both in it for A1111.

Roich et al., "Pivotal Tuning for Latent-based Editing of Real Images", 2021, https://arxiv.org/abs/2106.05744, is where
the idea comes from; cloneofsimo/lora brought it to diffusion models.
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
    batches = prepare(recipe, family, processes)

    # The word's vectors and the LoRA's factors are groups with learning rates of their own. Which of them rests in a
    # step is a function of the step: the trainer asks the adapter.
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
