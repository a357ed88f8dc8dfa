"""Files behind a URL, copied into the cache folder by fsspec: those that changed, whole or not at all. No torch."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from finetune import files
from finetune.config.origin import is_url
from finetune.data import captions, decoding
from finetune.data.origins.journal import Journal, kept
from finetune.errors import UserError

AT_ONCE = 8  # files that are fetched at a time
CONTENT = {"etag", "digest", "content-md5", "md5", "md5hash", "checksum", "sha256", "blob_id", "oid", "generation"}
TIMES = {"lastmodified", "last_modified", "mtime", "modified", "updated", "created"}
MARKS = CONTENT | TIMES | {"versionid", "version_id"}  # what stores tell one version of a file from another by
Info = Mapping[str, Any]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Remote:
    """A URL, the file system that it names, and the path there."""

    url: str
    fs: Any
    path: str

    @property
    def copied(self) -> str:
        """What the folder of the copies is called, for the name of a folder can be a caption."""
        return _split(self.path)[1] or "files"

    def listed(self, path: str) -> dict[str, Info]:
        """What lies in a folder, by name; nothing where there is no such folder."""
        try:
            entries = self.fs.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        return {_inside(_split(entry["name"])[1], self.url): entry for entry in entries}


def folder(url: str, cache: Path, where: str) -> tuple[Path, list[str]]:
    """A copy of a remote folder's pictures, text files and metadata, and the names of all else in it.

    Pictures in folders below it are copied where the metadata name them. Files that are gone there go here, too.

    Args:
        where: the URL stands in the recipe, for messages.

    Raises:
        UserError: there is no such folder, it cannot be read, or the library for its protocol is missing.
    """
    with _reaching(url, where):
        remote = _remote(url, where)
        if not remote.fs.isdir(remote.path):
            raise FileNotFoundError
        found = remote.listed(remote.path)
    with kept(cache, "mirrors", url) as (home, journal), _reaching(url, where):
        copy = home / remote.copied
        copy.mkdir(exist_ok=True)
        wanted = {name: info for name, info in found.items() if info["type"] == "file" and _is_read(name)}
        _fetch(remote, wanted, copy, journal)
        below = _named_below(remote, copy)
        _fetch(remote, below, copy, journal)
        for path in [path for path in copy.rglob("*") if path.is_file()]:
            if path.relative_to(copy).as_posix() not in wanted.keys() | below.keys():
                path.unlink()
    return copy, sorted(name for name in found if name not in wanted and not name.startswith("."))


def copies(url: str, cache: Path, where: str) -> list[Path]:
    """Copies of the files that a URL names, or all that match it where it holds ``*``, in the order of their names.

    Raises:
        UserError: there are none, they cannot be read, or the library for the protocol is missing.
    """
    with _reaching(url, where):
        remote = _remote(url, where)
        matched = remote.fs.glob(remote.path, detail=True) if "*" in url else {remote.path: remote.fs.info(remote.path)}
        found = {str(path): info for path, info in sorted(matched.items()) if info["type"] == "file"}
        if not found:
            raise FileNotFoundError
    result = []
    for parent, group in itertools.groupby(found, lambda path: _split(path)[0]):
        above = _Remote(url, remote.fs, parent)
        wanted = {_inside(_split(path)[1], url): found[path] for path in group}
        with kept(cache, "mirrors", parent, remote.fs.protocol) as (home, journal), _reaching(url, where):
            copy = home / above.copied
            _fetch(above, wanted, copy, journal)
        result += [copy / name for name in wanted]
    return result


def _remote(url: str, where: str) -> _Remote:
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:  # "Install s3fs to access S3"
        raise UserError(f"{where}: {url} needs a library that is not installed: {error}") from None
    except ValueError as error:
        raise UserError(f"{where}: {url} cannot be read: {error}") from None
    fs.invalidate_cache()
    return _Remote(url, fs, str(path))


@contextmanager
def _reaching(url: str, where: str) -> Iterator[None]:
    """Say of whatever a store raises which URL it is about."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{where}: {url} does not exist, or holds nothing") from None
    except Exception as error:  # every store has errors of its own
        raise UserError(f"{where}: {url} cannot be read: {type(error).__name__}: {error}") from None


def _is_read(name: str) -> bool:
    path = PurePosixPath(name)
    kind = decoding.is_picture(path) or path.suffix in captions.SIDECARS or name in captions.METADATA
    return kind and not name.startswith(".")


def _split(path: str) -> tuple[str, str]:
    """The folder and the name of a file; what a web address asks for behind ``?`` is part of neither."""
    bare = path.partition("?")[0] if is_url(path) else path
    parent, _, name = bare.rstrip("/").rpartition("/")
    return parent, name


def _inside(name: str, url: str) -> str:
    """``name``, if it is one that a file in a folder can have."""
    if name in ("", ".", "..") or "\0" in name or "/" in name:
        raise UserError(f"{url}: holds a file with a name that is none: {name!r}")
    return name


def _named_below(remote: _Remote, copy: Path) -> dict[str, Info]:
    """The pictures in folders below that the metadata name, and their text files."""
    table = captions.metadata_file(copy)
    names = [PurePosixPath(name) for name in captions.read_metadata(table)[0]] if table else []
    stems = {name.with_suffix("") for name in names if len(name.parts) > 1}
    found: dict[str, Info] = {}
    for parent in sorted({stem.parent for stem in stems}):
        for name, info in remote.listed(f"{remote.path.rstrip('/')}/{parent}").items():
            if info["type"] == "file" and _is_read(name) and (parent / name).with_suffix("") in stems:
                found[(parent / name).as_posix()] = info
    return found


def _fetch(remote: _Remote, wanted: Mapping[str, Info], copy: Path, journal: Journal) -> None:
    """Copy the files that are not there as they are at the remote now."""
    known = {record.get("name"): record.get("version") for record in journal.records()}

    def fetch(item: tuple[str, str]) -> None:
        name, version = item
        size = wanted[name].get("size")
        with files.replacing(copy / name) as temporary:
            remote.fs.get_file(wanted[name]["name"], str(temporary))
            if isinstance(size, int) and temporary.stat().st_size != size:
                raise OSError(f"{name} broke off after {temporary.stat().st_size} of {size} bytes")
        journal.add({"name": name, "version": version})

    versions = {name: _version(remote, info) for name, info in wanted.items()}
    needed = [
        (name, version)
        for name, version in versions.items()
        if not version or known.get(name) != version or not _is_whole(copy, wanted, name)
    ]
    if not needed:
        return
    log.info("%s: fetching %d of %d files", remote.url, len(needed), len(wanted))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for _ in pool.map(fetch, needed):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _version(remote: _Remote, info: Info) -> str:
    """What changes when a file does: its size and all marks that its store gives it; "" where it gives none."""
    marks = _marks(info) or _marks(remote.fs.info(info["name"]))  # a web server lists names alone
    size = info.get("size")
    return " ".join(marks if size is None else [f"size={size}", *marks])


def _marks(info: Info) -> list[str]:
    return [f"{key}={value}" for key, value in sorted(info.items()) if key.lower() in MARKS and value is not None]


def _is_whole(copy: Path, wanted: Mapping[str, Info], name: str) -> bool:
    path, size = copy / name, wanted[name].get("size")
    return path.is_file() and (size is None or path.stat().st_size == size)
