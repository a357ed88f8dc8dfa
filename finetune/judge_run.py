"""A finished run, asked again: its base and its exported file answer the same questions before the judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config import Recipe, read_recipe
from finetune.errors import UserError
from finetune.evaluation import Evaluation, Taught, ask
from finetune.export import pieces
from finetune.export.sample import adapted
from finetune.families import load_family
from finetune.family import ModelFamily
from finetune.sampling import draw
from finetune.train import RunFolder

if TYPE_CHECKING:
    from PIL import Image


def judge_run(path: Path) -> Evaluation:
    """Draw with the base and with the export of a run, judge both, and write ``evaluation.json`` into its folder.

    Args:
        path: the run's folder, or the recipe whose output it is.

    Raises:
        UserError: there is no finished run, or what it taught is none of the embedded world, which alone can be judged.
    """
    folder = RunFolder(path if path.is_dir() else Path(read_recipe(path).output))
    if not folder.lock.is_file():
        raise UserError(f"{folder.path} holds no run: there is no {folder.lock.name}")
    recipe = read_recipe(folder.lock)
    taught = _taught(recipe, folder.path)
    questions = taught.questions(recipe.data.concepts[0])
    untouched = load_family(recipe.model)
    before = ask(questions, lambda prompts, count: _draw(untouched, recipe, prompts, count))
    base = None if pieces(folder.path)[0].whole else recipe.model.path
    trained = adapted(folder.path, base, prompt_chunks=recipe.model.prompt_chunks, held=recipe.model)
    after = ask(questions, lambda prompts, count: _draw(trained, recipe, prompts, count))
    found = taught.evaluate(questions, before, after)
    found.write(folder.path)
    return found


def figures(found: Evaluation) -> str:
    """The measures before and after, a line each."""

    def line(name: str, of: str, sense: str) -> str:
        before, after = (getattr(side, of) for side in (found.before, found.after))
        return f"{name:<18} {before:6.2f} -> {after:5.2f}   {sense}"

    if found.kind == "subject":
        ends, pres, div = (
            "0: others of its class, 1: real pictures of it",
            "likeness of the bare class to the subject",
            "the bare class",
        )
    else:
        ends, pres, div = (
            "0: plain renders, 1: renders in it",
            "style of pictures that did not ask for it",
            "a plain prompt",
        )
    return "\n".join(
        [
            line(f"{found.kind} fidelity", "normalised", ends),
            line("prompt accuracy", "accuracy", f"real pictures reach {found.oracle_accuracy:.2f}"),
            line("PRES*", "pres", f"{pres}: lower is better"),
            line("DIV*", "div", f"variety of {div}: higher is better, real pictures {found.oracle_div:.2f}"),
        ]
    )


def _taught(recipe: Recipe, folder: Path) -> Taught:
    concepts = recipe.data.concepts
    found = Taught.of(concepts[0]) if len(concepts) == 1 else None
    if found is None:
        names = ", ".join(concept.source for concept in concepts)
        raise UserError(f"{folder}: only a subject or style of the embedded world can be judged, not {names}")
    return found


def _draw(family: ModelFamily, recipe: Recipe, prompts: Sequence[str], count: int) -> list[Image.Image]:
    return draw(family, prompts, count, recipe.report.sampler, recipe.seed, resolution=recipe.data.resolution)
