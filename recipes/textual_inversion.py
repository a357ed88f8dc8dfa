"""Textual inversion: find a new word for what a few pictures show, in a model that stays as it is.

    accelerate launch recipes/textual_inversion.py --config recipes/configs/textual-inversion-tiny.yaml

All that is learned is one or a few vectors in the text encoder's table, a file of some kilobytes. It can say only what
the model can draw already: more vectors hold more, weights (`recipes/dreambooth.py`, `recipes/pivotal.py`) hold most.

Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion", ICLR 2023,
https://arxiv.org/abs/2208.01618
"""

from finetune.config.command import run
from recipes.lora import main

__all__ = ["main"]

if __name__ == "__main__":
    run(main)
