"""The loop: ``check_run`` refuses what cannot begin, ``Trainer`` carries it out."""

from finetune.train.run import RunFolder, check_run
from finetune.train.trainee import Losses
from finetune.train.trainer import Trainer

__all__ = ["Losses", "RunFolder", "Trainer", "check_run"]
