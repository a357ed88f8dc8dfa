"""Pictures of the class, drawn once by the untouched model: what prior preservation compares with.

DreamBooth (Ruiz et al. 2023, https://arxiv.org/abs/2208.12242), section 3.3.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from finetune.config.schema import ImagesPrior, Recipe
from finetune.data import decoding
from finetune.data.cache import key
from finetune.data.decoding import Facts
from finetune.data.drawing import MANIFEST, ClassImages, Drawing, file_name, settings
from finetune.data.folders import picture_files
from finetune.data.processes import Alone, Processes
from finetune.data.sources import Concept, Picture, refuse
from finetune.errors import UserError
from finetune.family import ModelFamily

log = logging.getLogger(__name__)


def class_images(
    recipe: Recipe, family: ModelFamily, concepts: Sequence[Concept], processes: Processes | None = None
) -> list[Picture]:
    """The class images of a recipe, drawing those that are missing; none where its prior is not pictures.

    Must come before an adapter is attached. Image ``i`` is a pure function of the model, the prompt, the settings and
    the seed: an image that was deleted comes back bit for bit. Processes share the work.

    Raises:
        UserError: a concept has no class prompt, or the folder of the recipe holds too few pictures of one's own.
        GuardError: something in ``family`` trains already.
    """
    prior, processes = recipe.prior, processes or Alone()
    if not isinstance(prior, ImagesPrior):
        return []
    prompts = class_prompts(concepts)
    if prior.folder is not None and (own := _own(prior, Path(prior.folder), prompts)):
        return own
    pictures: list[Picture] = []
    for prompt in prompts:
        pictures += _pictures(drawn_for(recipe, prior, family, prompt).fill(processes), prompt)
    return pictures


def foreseen(recipe: Recipe, concepts: Sequence[Concept]) -> list[Picture]:
    """The class images of a run before any is drawn: a person's own, or as many squares, which have no files yet.

    Raises:
        UserError: as ``class_images``.
    """
    prior, side = recipe.prior, recipe.data.resolution
    if not isinstance(prior, ImagesPrior):
        return []
    prompts = class_prompts(concepts)
    if prior.folder is not None and (own := _own(prior, Path(prior.folder), prompts)):
        return own
    names = [(prompt, file_name(index)) for prompt in prompts for index in range(prior.count)]
    square = Facts(sha256="", bytes=0, width=side, height=side, transparent=False, frames=1)
    return [
        Picture(
            f"class: {prompt}/{name}", Path(name), (prompt,), replace(square, sha256=f"{prompt}/{name}"), prior=True
        )
        for prompt, name in names
    ]


def class_prompts(concepts: Sequence[Concept]) -> list[str]:
    """The class prompts of ``concepts``, each once, in their order.

    Raises:
        UserError: a concept has none.
    """
    missing = [index for index, concept in enumerate(concepts) if not concept.config.class_prompt]
    refuse([f'data.concepts[{index}]: prior preservation needs class_prompt, such as "a dog"' for index in missing])
    return list(dict.fromkeys(concept.config.class_prompt or "" for concept in concepts))


def _own(prior: ImagesPrior, folder: Path, prompts: Sequence[str]) -> list[Picture]:
    """A person's own pictures of the class; none where the folder is absent or holds no pictures itself."""
    if not folder.is_dir():
        return []
    paths, others = picture_files(folder, "prior.folder")
    if not paths:
        return []
    if len(prompts) > 1:
        raise UserError(f"prior.folder: {folder} holds pictures of one class, but the concepts have {len(prompts)}")
    if len(paths) < prior.count:
        raise UserError(
            f"prior.folder: {folder} holds {len(paths)} pictures, prior.count asks for {prior.count}; "
            "add pictures, lower the count, or leave out the folder to have them drawn"
        )
    if ignored := [path.name for path in others if path.name != MANIFEST]:
        log.warning("prior.folder: %s: ignored: %s", folder, ", ".join(ignored[:5]))
    return _pictures(paths, prompts[0])


def _pictures(paths: Sequence[Path], prompt: str) -> list[Picture]:
    pictures, problems = [], []
    for path in paths:
        try:
            facts = decoding.inspect(path)
            pictures.append(Picture(f"class: {prompt}/{path.name}", path, (prompt,), facts, prior=True))
        except UserError as error:
            problems.append(str(error))
    refuse(problems)
    return pictures


def drawn_for(recipe: Recipe, prior: ImagesPrior, family: ModelFamily, prompt: str) -> ClassImages:
    """The images of a class prompt as a recipe has them drawn, in a folder that is named by all that decides them."""
    drawing = Drawing(
        count=prior.count,
        sampler=prior.sampler,
        resolution=recipe.data.resolution,
        seed=recipe.seed,
        batch_size=prior.batch_size,
    )
    kept = Path(prior.folder or Path(recipe.data.cache.folder) / "class-images")
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40]
    name = f"{words}-{key('class images', **settings(drawing, family, prompt))[:12]}"
    return ClassImages(prompt, family, drawing, kept / name)
