"""Fine-tuning for diffusion models: LoRA, DreamBooth with prior preservation, full and partial fine-tuning."""

__version__ = "0.1.0"
