"""DreamBooth: teach a model one subject from a handful of pictures.

    accelerate launch recipes/dreambooth.py --config recipes/configs/dreambooth-tiny.yaml
    accelerate launch recipes/dreambooth.py --config recipes/configs/dreambooth-tiny.yaml adapter.rank=4 train.steps=400

The pictures are captioned with a rare word and the class of the subject, "a photo of sks dog". Trained on them alone, a
model forgets what other dogs look like. So it is also held to what it made of "a photo of a dog" before: by pictures
that the untouched model drew of the class, or by its own predictions. That is prior preservation.

Ruiz et al., "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation", CVPR 2023,
https://arxiv.org/abs/2208.12242
"""

from torch import Tensor

from finetune.adapters import attach
from finetune.batch import Batch
from finetune.config import Recipe
from finetune.config.command import run
from finetune.data import prepare
from finetune.denoise import PriorLoss, denoising_error, mixed_loss, pairwise_loss, preservation_error
from finetune.distributed import start
from finetune.families import load_family
from finetune.finish import finish
from finetune.preview import preview
from finetune.train import Trainer, check_run


def main(recipe: Recipe) -> None:
    processes = start(recipe.train)
    check_run(recipe, processes)
    family = load_family(recipe.model, recipe.objective, processes.device)

    # What the untouched model makes of the class is drawn first; then every picture and prompt is encoded once.
    batches = prepare(recipe, family, processes)

    # What is trained. The rest of the model stays frozen.
    adapter = attach(recipe.adapter, family, recipe.seed, processes.loading_device)
    if recipe.train.gradient_checkpointing:
        family.enable_gradient_checkpointing()

    def loss(batch: Batch) -> PriorLoss | Tensor:
        error = denoising_error(family, batch, recipe.seed)  # one number per picture
        match recipe.prior.kind:
            case "none":
                return error.mean()
            case "model":
                kept = preservation_error(family, adapter, batch, recipe.seed).mean()
                return PriorLoss(error.mean() + recipe.prior.weight * kept, error.mean(), kept)
            case "images":
                reduce = pairwise_loss if recipe.prior.layout == "pairwise" else mixed_loss
                return reduce(error, batch.prior, recipe.prior.weight)  # eq. 2 of the paper

    trainer = Trainer(recipe, processes, family.networks, adapter, loss)
    for batch in trainer.steps(batches):
        trainer.update(batch)
        if trainer.every(recipe.samples.every):
            preview(trainer, family, recipe.samples.prompts or batches.example_prompts)

    finish(trainer, family, batches)


if __name__ == "__main__":
    run(main)
