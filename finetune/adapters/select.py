"""From what a recipe names to names inside a network, with nothing left unmatched."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from finetune.errors import UserError, nearest
from finetune.family import ModelFamily

Presets = Mapping[str, Mapping[str, Sequence[str]]]
Match = Callable[[re.Pattern[str], str], object]


def networks(family: ModelFamily, text_encoder: bool) -> list[str]:
    """The networks whose layers a recipe trains: the denoiser, and the family's text encoders where it says so.

    Raises:
        UserError: it says so, and none of them trains.
    """
    if text_encoder and not family.sites.text_encoders:
        raise UserError(
            f"adapter.text_encoder: must be false for {family.name}, whose text encoder does not train: no tool reads "
            "a LoRA of it. It learns new words: adapter.kind embedding or pivotal"
        )
    return ["denoiser", *(family.sites.text_encoders if text_encoder else ())]


def select(
    key: str, wanted: str | Sequence[str], presets: Presets, network: str, names: Sequence[str], match: Match
) -> list[str]:
    """Those of ``names`` that any of ``wanted`` matches, in the order of ``names``.

    Args:
        key: of the recipe, for errors: "adapter.targets".
        wanted: presets of the family or regular expressions.
        presets: the family's.
        network: whose names they are.
        match: ``re.Pattern.fullmatch`` or ``re.Pattern.search``.

    Raises:
        UserError: an entry is no regular expression, or matches none of ``names``.
    """
    chosen: set[str] = set()
    for entry in [wanted] if isinstance(wanted, str) else wanted:
        patterns = presets[entry].get(network, []) if entry in presets else [entry]
        compiled = [_compile(key, pattern) for pattern in patterns]
        matched = {name for name in names if any(match(pattern, name) for pattern in compiled)}
        if not matched:
            raise UserError(f"{key}: {entry!r} matches nothing in the {network}{_hint(entry, presets, names)}")
        chosen |= matched
    if not chosen:
        raise UserError(f"{key}: nothing is named; presets: {', '.join(sorted(presets))}")
    return [name for name in names if name in chosen]


def ranks_of(names: Iterable[str], rank: int, own: Mapping[str, int]) -> dict[str, int]:
    """The rank of each of ``names``, ``<network>.<module path>``: that of the first pattern that matches a whole path.

    Raises:
        UserError: a pattern is no regular expression, or matches no path.
    """
    compiled = {_compile("adapter.ranks", pattern): size for pattern, size in own.items()}
    paths = {name: name.split(".", 1)[1] for name in names}
    for pattern in compiled:
        if not any(pattern.fullmatch(path) for path in paths.values()):
            hint = _hint(pattern.pattern, {}, list(paths.values()))
            raise UserError(f"adapter.ranks: {pattern.pattern!r} matches none of the adapted layers{hint}")
    return {
        name: next((size for pattern, size in compiled.items() if pattern.fullmatch(path)), rank)
        for name, path in paths.items()
    }


def check_same(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise UserError unless both hold the same names with the same shapes."""
    if missing := sorted(expected.keys() - found.keys()):
        raise UserError(f"{len(missing)} tensors are missing, the first is {missing[0]!r}")
    if unknown := sorted(found.keys() - expected.keys()):
        raise UserError(
            f"{len(unknown)} tensors are unknown, the first is {unknown[0]!r}{nearest(unknown[0], expected)}"
        )
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise UserError(f"{name}: the shape is {list(found[name].shape)}, expected {list(tensor.shape)}")


def _compile(key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}: {pattern!r} is no regular expression: {error}") from error


def _hint(entry: str, presets: Presets, names: Sequence[str]) -> str:
    """What may have been meant: whole paths, a preset, or the last levels of a name."""
    for attempt in (f".*{entry}", f"{entry}.*", f".*{entry}.*"):
        if found := next((name for name in names if re.fullmatch(attempt, name)), None):
            return f"; it must match whole names such as {found!r}: try {attempt!r}"
    levels = {level for name in names for level in name.split(".") if not level.isdigit()}
    close = nearest(entry.removeprefix(".*").lstrip("\\."), [*presets, *levels, *names])
    known = f"; presets: {', '.join(sorted(presets))}" if presets else ""
    return close if "did you mean" in close else f"{known}; a name is {names[0]!r}"
