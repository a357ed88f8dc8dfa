"""Custom Diffusion: a new word, and the few weights that read the prompt.

    accelerate launch recipes/custom_diffusion.py --config recipes/configs/custom-diffusion-tiny.yaml

Of the denoiser only those weights learn that make keys and values of the prompt in cross-attention, a few percent.
Beside them learns the vector of a new word, "photo of a <new1> cat". Class images hold the class in place, and key and
value of the start token, which stands in every prompt, are left alone. What comes out is a small file, a delta; those
of several concepts can be merged in closed form:

    finetune merge-concepts runs/cat runs/dog --out runs/both

Kumari et al., "Multi-Concept Customization of Text-to-Image Diffusion", CVPR 2023, https://arxiv.org/abs/2212.04488
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

    # What the untouched model makes of the class is drawn first; then every picture is encoded once.
    batches = prepare(recipe, family, processes)

    # adapter.weights: {kind: full, select: cross-kv, detach_start: true}, and adapter.embedding with the word.
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
