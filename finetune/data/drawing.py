"""Pictures of one class prompt in a folder: those that are missing are drawn, each the same whatever is missing.

Image ``i`` is a pure function of the model, the prompt, the settings and the seed, so that drawing can be interrupted,
shared by processes, and repeated for an image that was deleted or damaged.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import track

from finetune import files
from finetune.config.schema import SamplerConfig
from finetune.data import decoding
from finetune.data.cache import remove_stale
from finetune.data.folders import picture_files
from finetune.data.processes import Processes, told
from finetune.errors import GuardError, UserError
from finetune.family import ModelFamily
from finetune.randomness import generator
from finetune.sampling import arguments, change_scheduler, inference, untouched

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How class images are drawn.

    Attributes:
        count: images of each prompt.
        resolution: side in pixels; the model's own where it is None.
        seed: of all of them.
        batch_size: images drawn at a time.
    """

    count: int
    sampler: SamplerConfig
    resolution: int | None
    seed: int
    batch_size: int


def settings(drawing: Drawing, family: ModelFamily, prompt: str) -> dict[str, Any]:
    """What decides the images: with another value of any of these they are others."""
    sampler, chunks = drawing.sampler, family.prompt_chunks
    return {
        "prompt": prompt,
        **({"prompt_chunks": chunks} if chunks > 1 else {}),
        "family": family.name,
        "model": family.fingerprint("denoiser", "vae", *family.text_encoders),
        "resolution": drawing.resolution,
        "seed": drawing.seed,
        **sampler.model_dump(exclude={"guidance_rescale"}),
        **({"guidance_rescale": sampler.guidance_rescale} if sampler.guidance_rescale else {}),
    }


def file_name(index: int) -> str:
    """Of an image."""
    return f"{index:05}.png"


@dataclass(frozen=True)
class ClassImages:
    """The images of one class prompt.

    Attributes:
        family: the untouched model.
        folder: where they lie, with a manifest of their settings and hashes.
    """

    prompt: str
    family: ModelFamily
    drawing: Drawing
    folder: Path

    def require_own(self) -> None:
        """Refuse a folder that a person has named and that holds something else.

        Raises:
            UserError: it holds images of other settings, or pictures that were not drawn here.
        """
        told, asked = _manifest(self.folder).get("settings"), self._settings
        if told and told != asked:
            name = next(name for name in asked if asked[name] != told.get(name))
            found = f"of another {name}" if name == "model" else f"with {name} {told.get(name)!r}, not {asked[name]!r}"
            raise UserError(f"{self.folder}: holds images that were drawn {found}; use another folder")
        if not told and self.folder.is_dir() and (others := picture_files(self.folder, "class images")[0]):
            raise UserError(f"{self.folder}: holds {others[0].name}, which was not drawn here; use another folder")

    def fill(self, processes: Processes) -> list[Path]:
        """Draw what is missing and give all of them. Processes share the work.

        Raises:
            GuardError: something in ``family`` trains already.
        """
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        if processes.rank == 0:
            remove_stale(folder)
        missing = self._missing(folder)
        processes.barrier()  # nobody writes before everybody has looked
        if processes.rank == 0 and not (folder / MANIFEST).is_file():
            files.write_json(folder / MANIFEST, {"settings": self._settings, "files": {}})
        share = [i for i in missing if i // self.drawing.batch_size % processes.world == processes.rank]
        self._draw(folder, share, processes)
        processes.barrier()
        self._draw(folder, self._missing(folder), processes)  # of processes whose disk this one does not see
        paths = [folder / file_name(index) for index in range(self.drawing.count)]
        if processes.rank == 0:
            self._write_manifest(folder, paths)
        processes.barrier()
        return paths

    @property
    def _settings(self) -> dict[str, Any]:
        return settings(self.drawing, self.family, self.prompt)

    def _missing(self, folder: Path) -> list[int]:
        """The images that are absent or not what was written."""
        known = _hashes(folder)
        return [i for i in range(self.drawing.count) if not _whole(folder / file_name(i), known.get(file_name(i)))]

    def _draw(self, folder: Path, indices: Sequence[int], processes: Processes) -> None:
        if not indices:
            return
        if any(parameter.requires_grad for parameter in self.family.networks.parameters()):
            raise GuardError("class images must be drawn by the untouched model, but a part of it trains already")
        size, wanted = self.drawing.batch_size, set(indices)
        # always whole groups, since an image's neighbours can change its last bits
        groups = sorted({index // size for index in indices})
        with untouched(self.family), inference(self.family) as pipeline:
            if self.drawing.sampler.scheduler:
                pipeline.scheduler = change_scheduler(pipeline.scheduler, self.drawing.sampler.scheduler)
            title, quiet = f"Drawing {len(indices)} class images", processes.rank != 0
            groups_told = told(groups, f"{title}, {size} at a time", processes)
            for group in track(groups_told, title, len(groups), disable=quiet, transient=True):
                numbers = range(group * size, (group + 1) * size)
                for index, image in zip(numbers, self._sample(pipeline, numbers), strict=True):
                    if index in wanted:
                        with files.replacing(folder / file_name(index)) as temporary:
                            image.save(temporary, format="PNG")

    def _sample(self, pipeline: Any, numbers: Sequence[int]) -> list[Image.Image]:
        sampler, side = self.drawing.sampler, self.drawing.resolution
        drawn = pipeline(
            prompt=[self.prompt] * len(numbers),
            **arguments(self.family, pipeline, sampler, len(numbers)),
            height=side,
            width=side,
            generator=[generator(self.drawing.seed, "class image", self.prompt, index) for index in numbers],
        )
        return list(drawn.images)

    def _write_manifest(self, folder: Path, paths: Sequence[Path]) -> None:
        manifest = {
            "settings": self._settings,
            "files": _hashes(folder) | {path.name: files.sha256(path) for path in paths},
        }
        if not (folder / MANIFEST).is_file() or _hashes(folder) != manifest["files"]:
            files.write_json(folder / MANIFEST, manifest)


def _manifest(folder: Path) -> dict[str, Any]:
    """What a folder's manifest says; nothing where there is none or it is damaged."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _hashes(folder: Path) -> dict[str, str]:
    """What the manifest says of the files."""
    hashes = _manifest(folder).get("files")
    return hashes if isinstance(hashes, dict) else {}


def _whole(path: Path, sha256: str | None) -> bool:
    """Whether a file is there and is what was written; what the manifest does not list must decode."""
    if not path.is_file():
        return False
    try:
        return files.sha256(path) == sha256 if sha256 else bool(decoding.inspect(path))
    except UserError:
        return False
