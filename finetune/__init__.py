"""Fine-tuning for diffusion models: LoRA, DreamBooth with prior preservation, full and partial fine-tuning."""

import os

# Their advice is for programmers: transformers misses torchvision at every start, which the toolkit does without on
# purpose, and diffusers asks for an issue whenever a LoRA leaves the text encoder alone.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

__version__ = "0.1.0"
