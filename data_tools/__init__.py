"""What is done with pictures before training, each a module and a verb of ``finetune data``."""
