"""Hypernetwork: small networks that change what attention's keys and values read, as in A1111's web UI.

    accelerate launch recipes/hypernetwork.py --config recipes/configs/hypernetwork-tiny.yaml

The model stays as it is, down to the bit. What is learned acts in every layer and on every prompt, which suits a style
better than a subject. The `.pt` that is written is for A1111 and ComfyUI, the safetensors for diffusers.

docs/methods/hypernetwork.md has the maths, and where it comes from.
"""

from finetune.config.command import run
from recipes.lora import main

__all__ = ["main"]

if __name__ == "__main__":
    run(main)
