"""WebDataset: tars in which the members of one key are a picture and what belongs to it. No torch."""

from __future__ import annotations

import glob
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.config.origin import is_url
from finetune.config.schema import ConceptConfig
from finetune.data import captions, decoding
from finetune.data.folders import matching, nearest_folder
from finetune.data.origins import mirror, tars
from finetune.data.origins.samples import Finds, Sample
from finetune.data.places import TarMember
from finetune.errors import UserError, nearest

MASKS = "shards"  # what ``masks`` says for members beside the pictures
KEYS = ("text", "caption")  # of a sample's JSON
LARGEST_TEXT = 1 << 20  # bytes
MOST = 100_000  # shards that braces may name


def find(config: ConceptConfig, where: str, cache: Path) -> Finds:
    """The samples of all shards, one shard after the other, each in the order of its members' names."""
    shards = _files(config.shards or [], cache, f"{where}.shards")
    finds = Finds([])
    for name, path in zip(_names(shards), shards, strict=True):
        try:
            members, problems = tars.members(path, cache)
        except UserError as error:
            finds.problems.append(str(error))
            continue
        except OSError as error:
            finds.problems.append(f"{path}: cannot be read ({error.strerror})")
            continue
        finds.problems.extend(problems)
        _add(finds, members, name, config)
    if not finds.samples and not finds.problems:
        raise UserError(f"{where}.shards: {config.source} holds no pictures ({', '.join(sorted(decoding.SUFFIXES))})")
    return finds


def _add(finds: Finds, members: list[TarMember], shard: str, config: ConceptConfig) -> None:
    """The samples of one shard."""
    samples = []
    for group in _groups(members, finds.problems):
        try:
            if (sample := _sample(group, shard, config)) is not None:
                samples.append(sample)
        except UserError as error:
            finds.problems.append(str(error))
        finds.ignored.extend(member.member for member in group.others)
    finds.samples.extend(sorted(samples, key=lambda one: one.name.split("/")))  # as files of a folder are


@dataclass(slots=True)
class _Group:
    """The members of one key, told apart by what they are for."""

    pictures: list[TarMember] = field(default_factory=list)
    masks: list[TarMember] = field(default_factory=list)
    texts: list[TarMember] = field(default_factory=list)
    tables: list[TarMember] = field(default_factory=list)
    others: list[TarMember] = field(default_factory=list)

    def add(self, member: TarMember) -> None:
        """One more, of whatever kind."""
        extension = member.name.partition(".")[2].lower()
        if decoding.is_picture(member):
            (self.masks if extension.startswith("mask.") else self.pictures).append(member)
        elif f".{extension}" in captions.SIDECARS:
            self.texts.append(member)
        else:
            (self.tables if extension == "json" else self.others).append(member)


def _groups(members: list[TarMember], problems: list[str]) -> Iterable[_Group]:
    """Samples: a key is a member's name up to the first dot, its folder included."""
    known: set[str] = set()
    groups: dict[str, _Group] = {}
    for member in members:
        if member.member in known:
            problems.append(f"{member}: stands in the shard twice")
            continue
        known.add(member.member)
        parent, _, base = member.member.rpartition("/")
        groups.setdefault(f"{parent}/{base.partition('.')[0]}", _Group()).add(member)
    return groups.values()


def _sample(group: _Group, shard: str, config: ConceptConfig) -> Sample | None:
    """What a group says; None where it has no picture."""
    if len(group.pictures) > 1:  # "0.jpg" is the picture, "0.depth.jpg" another thing of the same sample
        exact = [one for one in group.pictures if one.name.count(".") == 1]
        group.others += [one for one in group.pictures if one not in exact] if len(exact) == 1 else []
        group.pictures = exact if len(exact) == 1 else group.pictures
    if len(group.pictures) > 1:
        names = " and ".join(one.member for one in group.pictures[:3])
        raise UserError(f"{group.pictures[0]}: {names} are one sample, for its name ends at the first dot; rename them")
    if not group.pictures:
        group.others += [*group.masks, *group.texts, *group.tables]
        return None
    (picture,) = group.pictures
    if config.masks != MASKS:
        group.others += group.masks
    elif not group.masks:
        raise UserError(f"{picture}: has no mask in its shard; expected {picture.name.partition('.')[0]}.mask.png")
    written = config.captions in ("auto", "metadata")
    return Sample(
        name=f"{shard}/{picture.member}",
        picture=picture,
        captions=tuple(itertools.chain.from_iterable(map(_told, group.tables))) if written else (),
        beside=_small(_first(group.texts)) if group.texts else None,
        mask=group.masks[0] if config.masks == MASKS else None,
    )


def _first(texts: list[TarMember]) -> TarMember:
    """Of ``0.txt`` and ``0.caption`` the one that counts in a folder, too."""
    return min(texts, key=lambda one: captions.SIDECARS.index(one.suffix.lower()))


def _told(member: TarMember) -> tuple[str, ...]:
    """The captions in a sample's JSON; none where it speaks of other things."""
    try:
        record: Any = json.loads(decoding.read(_small(member)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{member}: is not JSON that can be read: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f'{member}: expected {{"text": ...}}, found {json.dumps(record)[:40]}')
    found = next((record[key] for key in KEYS if record.get(key) is not None), None)
    return () if found is None else captions.choice(found, str(member))


def _small(member: TarMember) -> TarMember:
    if member.size > LARGEST_TEXT:
        raise UserError(f"{member}: has {member.size} bytes, far too many for a caption")
    return member


def _files(patterns: str | list[str], cache: Path, where: str) -> list[Path]:
    """The tars that patterns name, each once, in the order of the patterns and then of their names."""
    found: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for name in expanded(pattern):
            found += mirror.copies(name, cache, where) if is_url(name) else _local(name, where)
    return list(dict.fromkeys(found))


def _local(pattern: str, where: str) -> list[Path]:
    path = Path(pattern)
    found = matching(str(path / "*.tar") if path.is_dir() else pattern)
    if found:
        return found
    if path.is_dir():
        raise UserError(f"{where}: {path} holds no .tar")
    if glob.has_magic(pattern):
        raise UserError(f"{where}: {path} matches no file")
    near = nearest(path.name, [other.name for other in sorted(path.parent.glob("*.tar"))[:20]])
    raise UserError(f"{where}: {path} does not exist{near or nearest_folder(path)}")


def expanded(pattern: str) -> list[str]:
    """The names that braces stand for: ``{08..11}`` and ``{a,b}``, as in a shell.

    Raises:
        UserError: they are too many.
    """
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not found:
        return [pattern]
    if found[3] is not None:
        choices = found[3].split(",")
    else:
        first, last = int(found[1]), int(found[2])
        numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        choices = [str(number).zfill(len(found[1])) for number in numbers[: MOST + 1]]
    rest = expanded(pattern[found.end() :])
    if len(choices) * len(rest) > MOST:
        raise UserError(f"{pattern!r} names {len(choices) * len(rest)} files; at most {MOST} can be")
    return [pattern[: found.start()] + choice + end for choice in choices for end in rest]


def _names(shards: list[Path]) -> list[str]:
    """What ids call the shards: their names, with as many of the folders above as tell them apart."""
    for depth in range(1, max((len(path.parts) for path in shards), default=0) + 1):
        names = ["/".join(path.parts[-depth:]) for path in shards]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in shards]
