"""What a recipe may say, and how it is read. Loads no torch."""

from finetune.config.reader import RecipeError, lock, read_recipe
from finetune.config.schema import Recipe

__all__ = ["Recipe", "RecipeError", "lock", "read_recipe"]
