"""What a recipe would do, said before it does it. No weights are loaded and nothing is written but drawn subjects.

plan(recipe)            pictures, captions, steps, class images, caches, what trains, memory, files
render(plan, console)   the same for a person
"""

from finetune.plan.build import plan
from finetune.plan.contents import Advice, Arithmetic, Cache, ClassImages, Concept, Fit, Memory, Output, Plan, Way
from finetune.plan.render import render

__all__ = [
    "Advice",
    "Arithmetic",
    "Cache",
    "ClassImages",
    "Concept",
    "Fit",
    "Memory",
    "Output",
    "Plan",
    "Way",
    "plan",
    "render",
]
