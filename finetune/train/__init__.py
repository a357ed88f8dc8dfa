"""The loop: ``check_run`` refuses what cannot begin, ``Trainer`` carries it out, ``preview`` looks at it on the way."""

from finetune.train.preview import preview
from finetune.train.run import RunFolder, check_run
from finetune.train.trainer import Losses, Trainer

__all__ = ["Losses", "RunFolder", "Trainer", "check_run", "preview"]
