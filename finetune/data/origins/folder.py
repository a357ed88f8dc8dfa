"""A folder of pictures with captions in text files beside them or in metadata. No torch."""

from __future__ import annotations

from pathlib import Path

from finetune.config.origin import is_url
from finetune.config.schema import ConceptConfig
from finetune.data import captions, decoding
from finetune.data.folders import picture_files
from finetune.data.origins import mirror
from finetune.data.origins.samples import Finds, Sample
from finetune.errors import UserError, nearest


def find(config: ConceptConfig, where: str, cache: Path) -> Finds:
    """The pictures of a folder, and those in folders below it that its metadata name, in the order of their names."""
    named = config.folder or ""
    folder, passed = mirror.folder(named, cache, f"{where}.folder") if is_url(named) else (Path(named), [])
    files, others = picture_files(folder, f"{where}.folder")
    if config.captions == "folder" and config.folder_name is None:
        raise UserError(f"{where}.captions: is 'folder', but {named} is not called like '10_zib star'")
    metadata, rows, problems = _metadata(folder, config, where)
    files = sorted({*files, *(folder / name for name in rows if (folder / name).is_file())})
    if not files:
        raise UserError(f"{where}.folder: {named} holds no pictures ({', '.join(sorted(decoding.SUFFIXES))})")
    names = [path.relative_to(folder).as_posix() for path in files]
    for name in (name for name in rows if not (folder / name).is_file()):
        problems.append(f"{metadata}:{rows[name].line}: there is no {name} in the folder{nearest(name, names[:20])}")
    samples = [
        Sample(name, path, rows[name].captions if name in rows else (), captions.sidecar(path))
        for path, name in zip(files, names, strict=True)
    ]
    stems = {path.stem for path in files}
    ignored = [
        path.name
        for path in others
        if path != metadata and not (path.suffix in captions.SIDECARS and path.stem in stems)
    ]
    return Finds(samples, problems, sorted({*ignored, *passed}))


def _metadata(
    folder: Path, config: ConceptConfig, where: str
) -> tuple[Path | None, dict[str, captions.Row], list[str]]:
    """The file that a concept's captions are read from, where there is one, its rows, and what is wrong with others."""
    path = captions.metadata_file(folder)
    if config.captions == "metadata" and path is None:
        raise UserError(f"{where}.captions: there is no {' or '.join(captions.METADATA)} in {config.folder}")
    if config.captions not in ("auto", "metadata") or path is None:
        return path, {}, []
    return (path, *captions.read_metadata(path))
