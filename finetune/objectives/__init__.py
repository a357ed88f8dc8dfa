"""How latents are spoiled, what is asked back and what errors cost: pure tensor arithmetic, one idea a file.

process_of(scheduler, where)    what a base was trained on: DDPM, Flow or EDM
refined(process, section)       the objective of a run: that, as the recipe's ``objective`` section refines it
"""

from finetune.objectives.ddpm import DDPM
from finetune.objectives.denoising import Denoising
from finetune.objectives.edm import EDM
from finetune.objectives.flow import Flow
from finetune.objectives.process import Process
from finetune.objectives.recipe import refined
from finetune.objectives.scheduler import process_of

__all__ = ["DDPM", "EDM", "Denoising", "Flow", "Process", "process_of", "refined"]
