"""An adapter or a run to a model repository of the hub, in one commit; or to a folder, to look at it first."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.errors import GuardError, UserError
from finetune.export.base import absence
from finetune.export.layers import check
from finetune.export.read import Identity, read_pickle
from finetune.export.stream import require_new, tensors_of
from finetune.export.verify import verify
from finetune.files import replacing_folder
from finetune.publish.card import Card
from finetune.publish.gather import Gathered, gather
from finetune.publish.private import shareable

README, LOCK = "README.md", "recipe.lock.yaml"


@dataclass(frozen=True)
class Upload:
    """What goes up, checked.

    Attributes:
        texts: name in the repository -> text.
        notes: what could not be checked, and what should be known before strangers read it.
    """

    repository: str
    gathered: Gathered
    texts: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> dict[str, Path]:
        """Name in the repository -> file on this machine."""
        pictures = {name: one.path for name, one in self.gathered.pictures.items()}
        return {**self.gathered.files, **pictures}


def prepare(
    path: Path, repository: str, *, base: str | None = None, license: str | None = None, pictures: Sequence[Path] = ()
) -> Upload:
    """Gather, check every number, verify where the base model is on this machine, and write the card.

    Args:
        path: an adapter file, a model folder or a run's folder.
        repository: ``owner/name``.
        base: as in a recipe's ``model.path``; what the files say where it is not given.
        license: identifier of the hub.
        pictures: for the card, beside the run's previews.

    Raises:
        UserError: the repository has no such name, or ``path`` is nothing that can be uploaded.
        GuardError: a number is NaN or infinite, or a file fails a check of ``finetune verify``.
    """
    _require_name(repository)
    gathered = gather(path, pictures)
    notes: list[str] = []
    for piece in gathered.pieces:
        for file in _weights(piece):
            _require_finite(file)
        if why := absence(piece, base):
            notes.append(f"{piece.path.name}: not verified, {why} (--base)")
        else:
            verify(piece.path, None if piece.whole else base).require()
        if (said := piece.base) and Path(said).is_absolute():
            notes.append(f"{piece.path.name}: its header says that its base lies in {said}")
    texts = {README: str(Card.of(gathered, repository, license))}
    if gathered.recipe:
        texts[LOCK] = shareable(gathered.recipe)
    return Upload(repository, gathered, texts, tuple(notes))


def write(upload: Upload, folder: Path) -> list[str]:
    """Write what would be uploaded into a new folder, and return the names.

    Raises:
        UserError: there is something already.
    """
    with replacing_folder(require_new(folder)) as temporary:
        return _lay(upload, temporary, shutil.copyfile)


def push(
    upload: Upload, *, private: bool = False, revision: str | None = None, message: str | None = None, api: Any = None
) -> str:
    """Make the repository where there is none, and upload all in one commit.

    Args:
        private: the repository is for its owner alone.
        revision: branch; made where there is none.
        message: of the commit.
        api: ``huggingface_hub.HfApi()``.

    Returns:
        The repository's address.

    Raises:
        UserError: there is no token or it may not write there, the hub refuses, or it cannot be reached; or a
            repository that was to be private is there already and is public.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined] # of the library it speaks through

    hub: Any = api or HfApi()
    with tempfile.TemporaryDirectory(prefix="finetune-push-") as folder:
        _lay(upload, Path(folder), _link)
        try:
            made = hub.create_repo(upload.repository, private=private or None, exist_ok=True)
            if private and not hub.model_info(upload.repository).private:
                raise UserError(f"{upload.repository}: is there already and public; nothing was uploaded")
            if revision:
                hub.create_branch(upload.repository, branch=revision, exist_ok=True)
            hub.upload_folder(
                repo_id=upload.repository,
                folder_path=folder,
                revision=revision,
                commit_message=message or f"Upload {', '.join(one.path.name for one in upload.gathered.pieces)}",
            )
        except UserError:
            raise
        except (OSError, ValueError, HTTPError) as error:
            raise UserError(f"{upload.repository}: {_reason(error)}") from error
    return str(made)


def _reason(error: Exception) -> str:
    """What to do about it; the hub's own errors say what it was asked, and not that."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = str(error).strip().splitlines()
    first = said[0] if said else type(error).__name__
    if type(error).__name__ == "LocalTokenNotFoundError" or status == 401:
        return "you are not logged in; run `hf auth login`, or set HF_TOKEN to a token that may write"
    if status == 403:
        return "your token may not write there; take one with write access, and a name of your own or your organisation"
    if status is not None:
        return f"the hub refused with status {status}: {first}"
    if isinstance(error, ValueError):
        return first
    return f"the hub cannot be reached ({first}); --dry-run FOLDER needs no network"


def _require_name(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository!r} is no name of a repository: {error}") from error
    if repository.count("/") != 1:
        raise UserError(f"{repository!r} is no name of a repository; expected owner/name")


def _weights(piece: Identity) -> list[Path]:
    return sorted(piece.path.rglob("*.safetensors")) if piece.path.is_dir() else [piece.path]


def _require_finite(path: Path) -> None:
    """Refuse a file that holds a NaN or nothing.

    Raises:
        GuardError: naming the tensor.
    """
    found = _of_pickle(read_pickle(path)) if path.suffix == ".pt" else tensors_of(path)
    held = False
    try:
        for name, tensor in found:
            held = True
            if tensor.is_floating_point():
                check({name: tensor})
        if not held:
            check({})
    except GuardError as error:
        raise GuardError(f"{path}: {error}") from error


def _of_pickle(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name or "the tensor", value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _of_pickle(one, f"{name}.{key}".strip("."))
    elif isinstance(value, list | tuple):
        for place, one in enumerate(value):
            yield from _of_pickle(one, f"{name}.{place}".strip("."))


def _lay(upload: Upload, folder: Path, put: Callable[[Path, Path], object]) -> list[str]:
    """Put everything into a folder under its names in the repository."""
    for name, file in upload.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        put(file, folder / name)
    for name, text in upload.texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return sorted([*upload.files, *upload.texts])


def _link(file: Path, target: Path) -> None:
    """A second name of a file, which may be many gigabytes; a copy where there are no links."""
    try:
        target.symlink_to(file.resolve())
    except OSError:
        shutil.copyfile(file, target)
