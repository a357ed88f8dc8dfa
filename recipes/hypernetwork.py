"""Hypernetwork: small networks that change what attention's keys and values read, as in A1111's web UI.

    accelerate launch recipes/hypernetwork.py --config recipes/configs/hypernetwork-tiny.yaml

The model stays as it is, down to the bit. What is learned acts in every layer and on every prompt, which suits a style
better than a subject. The `.pt` that is written is for A1111 and ComfyUI, the safetensors for diffusers.

docs/methods/hypernetwork.md has the maths, and where it comes from.
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
