"""Fine-tuning for diffusion models: LoRA, DreamBooth with prior preservation, full and partial fine-tuning."""

import os

# The toolkit does without torchvision on purpose, and transformers would advise otherwise at every start.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

__version__ = "0.1.0"
