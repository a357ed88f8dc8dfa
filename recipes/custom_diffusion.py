"""Custom Diffusion: a new word, and the few weights that read the prompt.

    accelerate launch recipes/custom_diffusion.py --config recipes/configs/custom-diffusion-tiny.yaml

Of the denoiser only those weights learn that make keys and values of the prompt in cross-attention, a few percent.
Beside them learns the vector of a new word, "photo of a <new1> cat". Class images hold the class in place, and key and
value of the start token, which stands in every prompt, are left alone. What comes out is a small file, a delta; those
of several concepts can be merged in closed form:

    finetune merge-concepts runs/cat runs/dog --out runs/both

Kumari et al., "Multi-Concept Customization of Text-to-Image Diffusion", CVPR 2023, https://arxiv.org/abs/2212.04488
"""

from finetune.config.command import run
from recipes.lora import main

__all__ = ["main"]

if __name__ == "__main__":
    run(main)
