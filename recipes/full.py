"""Full and partial fine-tuning: a model's own weights, all of them or a selection, learn captioned pictures.

    accelerate launch recipes/full.py --config recipes/configs/full-tiny.yaml
    accelerate launch recipes/full.py --config recipes/configs/full-tiny.yaml adapter.select=cross-attention

Writes a whole model. For a domain or a style with many pictures; `recipes/dreambooth.py` with `adapter.kind=full` is
the same for one subject, with prior preservation.
"""

from torch import Tensor

from finetune.adapters import attach
from finetune.batch import Batch
from finetune.config import Recipe
from finetune.config.command import run
from finetune.data import prepare
from finetune.denoise import denoising_error
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

    def loss(batch: Batch) -> Tensor:
        return denoising_error(family, batch, recipe.seed).mean()

    trainer = Trainer(recipe, processes, family.networks, adapter, loss)
    for batch in trainer.steps(batches):
        trainer.update(batch)
        if trainer.every(recipe.samples.every):
            preview(trainer, family, recipe.samples.prompts or batches.example_prompts)

    finish(trainer, family, batches)


if __name__ == "__main__":
    run(main)
