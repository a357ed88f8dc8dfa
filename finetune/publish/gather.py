"""What of an adapter or a run goes to a hub: files of weights, their cards, previews, the recipe. Nothing else does.

Caches, training pictures, checkpoints and logs stay where they are, because files are taken by name and not left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.config import Recipe, read_recipe
from finetune.errors import UserError
from finetune.export.full import components
from finetune.export.metadata import OWN
from finetune.export.read import MODEL, Identity, identify, locate
from finetune.export.read import pieces as chosen
from finetune.train import RunFolder

_MODEL_FILES = {".safetensors", ".json", ".txt", ".model", ".jinja"}
_PICTURES = {".png", ".jpg", ".jpeg", ".webp"}
_SHOWN = 8  # previews of a card at most


@dataclass(frozen=True)
class Picture:
    """A picture of the card.

    Attributes:
        prompt: what it was drawn from; None where that is not known.
    """

    path: Path
    prompt: str | None


@dataclass(frozen=True)
class Gathered:
    """What is uploaded beside the card.

    Attributes:
        pieces: files and folders of weights.
        used: those of them that diffusers draws with.
        files: name in the repository -> file.
        recipe: of the run that they come from, where there is one.
        versions: of the libraries that the run was made with.
        pictures: name in the repository -> picture.
    """

    pieces: Sequence[Identity]
    used: Sequence[Identity]
    files: Mapping[str, Path]
    recipe: Recipe | None
    versions: Mapping[str, str]
    pictures: Mapping[str, Picture]


def gather(path: Path, pictures: Sequence[Path] = ()) -> Gathered:
    """Find what belongs to an adapter, or to all that a run exported.

    Args:
        path: an adapter file, a model folder or a run's folder. A file in a run's folder takes the run's recipe and
            previews along, and not the other files.
        pictures: to be shown as well.

    Raises:
        UserError: there is no adapter, the run has not ended, or a picture is none or one that was trained with.
    """
    run = _run(path)
    recipe = read_recipe(run.lock) if run else None
    pieces = [identify(one) for one in _weights(path, run)]
    if run and recipe:
        _require_ended(pieces, recipe, run)
    files: dict[str, Path] = {}
    for name, file in (pair for piece in pieces for pair in _files(piece)):
        if files.setdefault(name, file) != file:
            raise UserError(f"{file} and {files[name]} would both be called {name}; name one of them")
    shown = [*(_previews(run, recipe) if run and recipe else ()), *_given(pictures, recipe)]
    return Gathered(
        pieces=pieces,
        used=chosen(path),
        files=files,
        recipe=recipe,
        versions=_versions(run) if run else {},
        pictures={f"images/{number}{one.path.suffix.lower()}": one for number, one in enumerate(shown)},
    )


def _run(path: Path) -> RunFolder | None:
    """The run that a path is or lies in."""
    for folder in (path, path.absolute().parent, path.absolute().parent.parent):
        if RunFolder(folder).lock.is_file():
            return RunFolder(folder)
    return None


def _weights(path: Path, run: RunFolder | None) -> list[Path]:
    if not path.is_dir() or (path / "model_index.json").is_file():
        return [locate(path)]
    folder = path / "adapters" if (path / "adapters").is_dir() or (run and run.path == path) else path
    model = folder / MODEL
    found = [model] if (model / "model_index.json").is_file() else []
    found += sorted([*folder.glob("[!.]*.safetensors"), *folder.glob("[!.]*.pt")])
    if found:
        return found
    if run:
        raise UserError(f"{run.path}: has no finished export in adapters/; let it end: finetune train {run.lock}")
    raise UserError(f"{path}: holds no adapter and is no run's folder")


def _require_ended(pieces: Sequence[Identity], recipe: Recipe, run: RunFolder) -> None:
    """Refuse the export of a run that went on and was broken off: the recipe beside it is no longer its own."""
    wanted = recipe.train.total_steps
    for piece in pieces:
        steps = piece.metadata.get(f"{OWN}steps", "")
        if steps.isdecimal() and int(steps) != wanted:
            raise UserError(
                f"{piece.path}: is of {steps} steps, and the run's recipe has {wanted}; let it end: "
                f"finetune train {run.lock}"
            )


def _files(piece: Identity) -> Iterator[tuple[str, Path]]:
    """What a piece is made of. A whole model lies at the top, where ``from_pretrained`` looks for it."""
    if not piece.path.is_dir():
        yield piece.path.name, piece.path
        if (card := piece.path.with_suffix(".json")).is_file():  # the words that call it, for A1111 and Forge
            yield card.name, card
        return
    yield "model_index.json", piece.path / "model_index.json"
    for part in components(piece.path):
        for file in sorted((piece.path / part).iterdir()):
            if file.is_file() and file.suffix in _MODEL_FILES:
                yield f"{part}/{file.name}", file


def _previews(run: RunFolder, recipe: Recipe) -> list[Picture]:
    """The last pictures that were drawn on the way."""
    steps = sorted(run.samples.glob("step-*"))
    prompts = recipe.samples.prompts or _examples(recipe)
    found = []
    for path in sorted(steps[-1].glob("*.png")) if steps else ():
        if named := re.fullmatch(r"(\d+)-\d+", path.stem):
            number = int(named[1])
            found.append(Picture(path, prompts[number] if number < len(prompts) else None))
    return found[:_SHOWN]


def _examples(recipe: Recipe) -> list[str]:
    """What previews draw where a recipe names nothing, as far as it is known without the pictures."""
    own = [concept.prompt for concept in recipe.data.concepts]
    classes = [concept.class_prompt for concept in recipe.data.concepts]
    return list(dict.fromkeys(prompt for prompt in (*own, *classes) if prompt)) if all(own) else []


def _given(pictures: Sequence[Path], recipe: Recipe | None) -> Iterator[Picture]:
    taught = [Path(one.folder) for one in recipe.data.concepts if one.folder] if recipe else []
    for path in pictures:
        if not path.is_file() or path.suffix.lower() not in _PICTURES:
            raise UserError(f"{path}: is no picture; expected a file that ends with {', '.join(sorted(_PICTURES))}")
        if any(path.resolve().is_relative_to(folder.resolve()) for folder in taught):
            raise UserError(f"{path}: was trained with, and such pictures are not uploaded; draw some: finetune sample")
        yield Picture(path, None)


def _versions(run: RunFolder) -> dict[str, str]:
    """As the comments at the head of the run's recipe say."""
    lines = run.lock.read_text(encoding="utf-8").splitlines()
    return dict(found.groups() for line in lines if (found := re.fullmatch(r"# (\w+) (\S+)", line)))  # type: ignore[misc]
