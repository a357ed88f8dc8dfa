"""Pictures of the class, drawn once by the untouched model: what prior preservation compares with.

DreamBooth (Ruiz et al. 2023, https://arxiv.org/abs/2208.12242), section 3.3.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import track

from finetune import files
from finetune.config.schema import ImagesPrior, Recipe
from finetune.data import decoding
from finetune.data.cache import key, remove_stale
from finetune.data.decoding import Facts
from finetune.data.folders import picture_files
from finetune.data.processes import Alone, Processes
from finetune.data.sources import Concept, Picture, refuse
from finetune.errors import GuardError, UserError
from finetune.family import ModelFamily
from finetune.randomness import generator
from finetune.sampling import arguments, change_scheduler, inference, untouched

MANIFEST = "manifest.json"
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
        pictures += ClassImages(recipe, prior, family, prompt).fill(processes)
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
    names = [(prompt, _name(index)) for prompt in prompts for index in range(prior.count)]
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
    if others:
        log.warning("prior.folder: %s: ignored: %s", folder, ", ".join(path.name for path in others[:5]))
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


@dataclass(frozen=True)
class ClassImages:
    """The images of one class prompt, in a folder that is named by everything that decides them."""

    recipe: Recipe
    prior: ImagesPrior
    family: ModelFamily
    prompt: str

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the images; another value of any of these is another folder."""
        chunks = self.family.prompt_chunks
        return {
            "prompt": self.prompt,
            **({"prompt_chunks": chunks} if chunks > 1 else {}),
            "family": self.family.name,
            "model": self.family.fingerprint("denoiser", "vae", *self.family.text_encoders),
            "resolution": self.recipe.data.resolution,
            "seed": self.recipe.seed,
            **self.prior.sampler.model_dump(exclude={"guidance_rescale"}),
            **({"guidance_rescale": rescale} if (rescale := self.prior.sampler.guidance_rescale) else {}),
        }

    @property
    def folder(self) -> Path:
        """Where they lie."""
        kept = self.prior.folder or Path(self.recipe.data.cache.folder) / "class-images"
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:40]
        return Path(kept) / f"{words}-{key('class images', **self.settings)[:12]}"

    def fill(self, processes: Processes) -> list[Picture]:
        """Draw what is missing and give all of them."""
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        if processes.rank == 0:
            remove_stale(folder)
        missing = self._missing(folder)
        processes.barrier()  # nobody writes before everybody has looked
        share = [i for i in missing if i // self.prior.batch_size % processes.world == processes.rank]
        self._draw(folder, share, quiet=processes.rank != 0)
        processes.barrier()
        self._draw(folder, self._missing(folder), quiet=True)  # of processes whose disk this one does not see
        paths = [folder / _name(index) for index in range(self.prior.count)]
        if processes.rank == 0:
            self._write_manifest(folder, paths)
        processes.barrier()
        return _pictures(paths, self.prompt)

    def _missing(self, folder: Path) -> list[int]:
        """The images that are absent or not what was written."""
        known = _hashes(folder)
        return [i for i in range(self.prior.count) if not _whole(folder / _name(i), known.get(_name(i)))]

    def _draw(self, folder: Path, indices: Sequence[int], quiet: bool) -> None:
        if not indices:
            return
        if any(parameter.requires_grad for parameter in self.family.networks.parameters()):
            raise GuardError("class images must be drawn by the untouched model, but a part of it trains already")
        size, wanted = self.prior.batch_size, set(indices)
        # always whole groups, since an image's neighbours can change its last bits
        groups = sorted({index // size for index in indices})
        with untouched(self.family), inference(self.family) as pipeline:
            if self.prior.sampler.scheduler:
                pipeline.scheduler = change_scheduler(pipeline.scheduler, self.prior.sampler.scheduler)
            for group in track(groups, f"Drawing {len(indices)} class images", disable=quiet, transient=True):
                numbers = range(group * size, (group + 1) * size)
                for index, image in zip(numbers, self._sample(pipeline, numbers), strict=True):
                    if index in wanted:
                        with files.replacing(folder / _name(index)) as temporary:
                            image.save(temporary, format="PNG")

    def _sample(self, pipeline: Any, numbers: Sequence[int]) -> list[Image.Image]:
        sampler, side = self.prior.sampler, self.recipe.data.resolution
        drawn = pipeline(
            prompt=[self.prompt] * len(numbers),
            **arguments(sampler, pipeline),
            height=side,
            width=side,
            generator=[generator(self.recipe.seed, "class image", self.prompt, index) for index in numbers],
        )
        return list(drawn.images)

    def _write_manifest(self, folder: Path, paths: Sequence[Path]) -> None:
        manifest = {
            "settings": self.settings,
            "files": _hashes(folder) | {path.name: files.sha256(path) for path in paths},
        }
        if not (folder / MANIFEST).is_file() or _hashes(folder) != manifest["files"]:
            files.write_json(folder / MANIFEST, manifest)


def _name(index: int) -> str:
    return f"{index:05}.png"


def _hashes(folder: Path) -> dict[str, str]:
    """What the manifest says of the files; nothing where there is none or it is damaged."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return hashes if isinstance(hashes, dict) else {}


def _whole(path: Path, sha256: str | None) -> bool:
    """Whether a file is there and is what was written; what the manifest does not list must decode."""
    if not path.is_file():
        return False
    try:
        return files.sha256(path) == sha256 if sha256 else bool(decoding.inspect(path))
    except UserError:
        return False
