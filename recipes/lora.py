"""LoRA: a small change of some of a model's weights, learned from captioned pictures.

    accelerate launch recipes/lora.py --config recipes/configs/lora-tiny.yaml

For a style, a set of things, or a subject where nothing needs to be held in place; for one subject from a handful of
pictures, `recipes/dreambooth.py` adds prior preservation.

The page is the same for all that differs in what is trained alone: recipes/full.py, textual_inversion.py, pivotal.py,
custom_diffusion.py and hypernetwork.py run it.

`adapter.kind` may be `lora`, with its variants DoRA, rsLoRA, LoRA+ and PiSSA, or `lokr`, `loha` or `oft`: they differ
in what a change may look like; docs/methods/lora-family.md tells which is for what.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, https://arxiv.org/abs/2106.09685
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
from finetune.preview import preview
from finetune.train import Trainer, check_run


def main(recipe: Recipe) -> None:
    processes = start(recipe.train)
    check_run(recipe, processes)
    family = load_family(recipe.model, recipe.objective, processes.device)
    batches = prepare(recipe, family, processes)
    adapter = attach(recipe.adapter, family, recipe.seed, processes.loading_device)
    if recipe.train.gradient_checkpointing:
        family.enable_gradient_checkpointing()

    def loss(batch: Batch) -> PriorLoss | Tensor:
        return training_loss(family, adapter, batch, recipe)  # recipes/dreambooth.py spells it out

    trainer = Trainer(recipe, processes, family.networks, adapter, loss)
    for batch in trainer.steps(batches):
        trainer.update(batch)
        if trainer.every(recipe.samples.every):
            preview(trainer, family, recipe.samples.prompts or batches.example_prompts)

    finish(trainer, family, batches)


if __name__ == "__main__":
    run(main)
