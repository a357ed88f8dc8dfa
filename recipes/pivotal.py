"""Pivotal tuning: a new word and a LoRA, trained together.

    accelerate launch recipes/pivotal.py --config recipes/configs/pivotal-tiny.yaml
    accelerate launch recipes/pivotal.py --config recipes/configs/pivotal-two-phase-tiny.yaml

A LoRA alone has to tie a subject to a word that exists, and a word alone can only ask for what the model can draw. Here
the word learns first, or beside the LoRA, for a share of the steps: up to the pivot. Then it rests, bit for bit, and
the LoRA goes on. What comes out is two files, and one with both in it for A1111.

Roich et al., "Pivotal Tuning for Latent-based Editing of Real Images", 2021, https://arxiv.org/abs/2106.05744, is where
the idea comes from; cloneofsimo/lora brought it to diffusion models.
"""

from finetune.config.command import run
from recipes.lora import main

__all__ = ["main"]

if __name__ == "__main__":
    run(main)
