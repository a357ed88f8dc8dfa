"""How a recipe's page is started, and what a command's exit code says."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from finetune.config.origin import EMBEDDED
from finetune.config.reader import RecipeError, read_recipe
from finetune.config.schema import ConceptConfig, Recipe
from finetune.errors import GuardError, Stopped, UserError, nearest

PROFILES = Path("launch/accelerate")
BAD_INPUT, STOPPED, GUARDED = 2, 3, 4
LAST_WORDS = "FINETUNE_LAST_WORDS"
"""Names the folder where processes leave the code that they end with, for a launcher that would lose it."""


def run(main: Callable[[Recipe], None], arguments: Sequence[str] | None = None) -> None:
    """Read ``--config FILE [key=value ...]`` and hand the recipe to ``main``; ends the process with its exit code.

    Args:
        arguments: as on a command line; ``sys.argv[1:]`` by default.
    """
    with exit_codes():
        config, overrides = _arguments(list(sys.argv[1:] if arguments is None else arguments))
        main(read_recipe(config, overrides))


def run_recipe(path: Path, overrides: Sequence[str]) -> None:
    """Run the page of a recipe in this process."""
    recipe = read_recipe(path, overrides)
    importlib.import_module(f"recipes.{recipe.recipe}").main(recipe)


def launch_recipe(path: Path, overrides: Sequence[str], profile: str, options: Sequence[str] = ()) -> NoReturn:
    """Become ``finetune.launch``, which starts the recipe's page in as many processes as ``profile`` says.

    Args:
        profile: a file of accelerate's, or the name of one in launch/accelerate, below the current folder or beside
            the recipes' pages.
        options: of ``accelerate launch``, which win over the profile.

    Raises:
        UserError: the recipe is wrong, which is found before anything starts, or there is no such profile.
    """
    recipe = read_recipe(path, overrides)
    found = importlib.util.find_spec(f"recipes.{recipe.recipe}")
    if found is None or found.origin is None:
        raise UserError(f"the page recipes/{recipe.recipe}.py is not installed")
    page = Path(found.origin)
    settings = _profile(profile, [Path.cwd(), page.parents[1]])
    launcher = [sys.executable, "-m", "finetune.launch", "--config_file", str(settings), *options]
    sys.stdout.flush()
    os.execv(sys.executable, [*launcher, str(page), "--config", str(path), *overrides])


def launch_options(words: Sequence[str], profile: str | None) -> tuple[list[str], list[str]]:
    """``key=value`` settings, and what follows them for ``accelerate launch``, which begins with its first option.

    Raises:
        UserError: there are options and nothing is launched.
    """
    first = next((number for number, word in enumerate(words) if word.startswith("-")), len(words))
    settings, options = list(words[:first]), list(words[first:])
    if options and profile is None:
        raise UserError(f"{options[0]}: an option of accelerate launch, which --launch PROFILE starts; there is none")
    return settings, options


def run_each(path: Path, overrides: Sequence[str], profile: str | None = None, options: Sequence[str] = ()) -> None:
    """Run a recipe once for each of its concepts, each into a folder of its own below ``output``.

    Every run is a process of its own, as if it had been asked for alone, and is continued where it stopped. Ends this
    process with the exit code of the first run that fails.

    Raises:
        UserError: the recipe is wrong, which is found before anything starts.
    """
    recipe = read_recipe(path, overrides)
    launch = [] if profile is None else ["--launch", profile, *(["--", *options] if options else [])]
    for name, concept in concept_names(recipe).items():
        alone = [f"data.concepts={json.dumps([concept.model_dump(mode='json')])}", f"output={recipe.output}/{name}"]
        print(f"{name}: {recipe.output}/{name}", flush=True)
        code = subprocess.run(
            [sys.executable, "-m", "finetune", "train", str(path), *overrides, *alone, *launch], check=False
        ).returncode
        if code:
            raise SystemExit(code)


def concept_names(recipe: Recipe) -> dict[str, ConceptConfig]:
    """The concepts of a recipe under names that can be folders: the trigger, or the source; each its own."""
    named: dict[str, ConceptConfig] = {}
    for concept in recipe.data.concepts:
        word = concept.trigger or concept.source.removeprefix(EMBEDDED)
        stem = re.sub(r"[^\w.-]+", "-", word).strip("-.") or "concept"
        numbered = (stem if number == 1 else f"{stem}-{number}" for number in itertools.count(1))
        named[next(name for name in numbered if name not in named)] = concept
    return named


def _profile(name: str, roots: Sequence[Path]) -> Path:
    if Path(name).is_file():
        return Path(name)
    folders = [root / PROFILES for root in roots]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({file.stem for folder in folders if folder.is_dir() for file in folder.glob("*.yaml")})
    raise UserError(f"--launch: {name!r} is no file and no profile of {PROFILES}{nearest(name, known)}")


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn the toolkit's own errors into one message on stderr and an exit code; other errors keep their traceback."""
    try:
        yield
    except UserError as error:
        _leave(error, BAD_INPUT)
    except Stopped as error:
        _leave(error, STOPPED)
    except GuardError as error:
        _leave(error, GUARDED)


def _arguments(arguments: list[str]) -> tuple[Path, list[str]]:
    overrides = [argument for argument in arguments if not argument.startswith("--config=")]
    files = [argument.partition("=")[2] for argument in arguments if argument not in overrides]
    while "--config" in overrides:
        at = overrides.index("--config")
        files += overrides[at + 1 : at + 2]
        del overrides[at : at + 2]
    if len(files) != 1 or any(override.startswith("-") for override in overrides):
        raise UserError(f"usage: {Path(sys.argv[0]).name} --config RECIPE.yaml [key=value ...]")
    return Path(files[0]), overrides


def _leave(error: Exception, code: int) -> None:
    """Say it and end. Every process of a run finds the same in a recipe, so one of them says it."""
    sys.last_value = error  # as the interpreter does with what nobody catches: the other processes are told of it
    rank = os.environ.get("RANK", "0")
    if rank == "0" or not isinstance(error, RecipeError):
        said = f"{error}" if rank == "0" else f"rank {rank}: {error}"
        print(said, file=sys.stderr, flush=True)
    if LAST_WORDS in os.environ:
        with suppress(OSError):  # a launcher that has gone needs none
            (Path(os.environ[LAST_WORDS]) / rank).write_text(str(code), encoding="utf-8")
    raise SystemExit(code) from None
