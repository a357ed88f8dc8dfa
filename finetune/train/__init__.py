"""The loop: ``open_run`` says where a run lives, ``Trainer`` carries it out, ``preview`` looks at it on the way."""

from finetune.train.preview import preview
from finetune.train.run import RunFolder, open_run
from finetune.train.trainer import Losses, Trainer

__all__ = ["Losses", "RunFolder", "Trainer", "open_run", "preview"]
