"""Full and partial fine-tuning: a model's own weights, all of them or a selection, learn captioned pictures.

    accelerate launch recipes/full.py --config recipes/configs/full-tiny.yaml
    accelerate launch recipes/full.py --config recipes/configs/full-tiny.yaml adapter.select=cross-attention

Writes a whole model, or of a selection a small delta. For a domain or a style with many pictures;
`recipes/dreambooth.py` with `adapter.kind=full` spells out the same for one subject.
"""

from finetune.config.command import run
from recipes.lora import main

__all__ = ["main"]

if __name__ == "__main__":
    run(main)
