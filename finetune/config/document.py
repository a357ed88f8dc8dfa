"""YAML that remembers where everything stands.

The scalars are those of YAML 1.2: `no` is a word and `1e-4` is a number, unlike in the YAML 1.1 that PyYAML reads by
default. No tag builds an object, a key may stand once, and aliases cannot blow a small file up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import yaml

MAX_VALUES = 100_000
MAX_DEPTH = 40

FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
SCALARS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|"),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+"),
    ("tag:yaml.org,2002:float", FLOAT),
)


class Place(NamedTuple):
    """Where something was said: a line of a file, or an override as a whole (line 0)."""

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


class Problem(NamedTuple):
    """One thing wrong with a recipe."""

    place: Place
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclass(frozen=True)
class Located:
    """A value and where its key stands. Mappings and lists hold further located values."""

    value: Any
    place: Place

    def plain(self) -> Any:
        """The value alone, as ``yaml.safe_load`` would give it."""
        if isinstance(self.value, dict):
            return {key: below.plain() for key, below in self.value.items()}
        if isinstance(self.value, list):
            return [below.plain() for below in self.value]
        return self.value

    def below(self, key: str | int) -> Located | None:
        """The value at one key or index."""
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int) and 0 <= key < len(self.value):
            item: Located = self.value[key]
            return item
        return None


class _Loader(yaml.SafeLoader):
    """Reads the scalars listed above as what they are, and all others as text."""


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would read as something else than text."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern in SCALARS:
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), None)
    _Dumper.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), None)


def parse(text: str, source: str, line: int | None = None) -> tuple[Located, list[Problem]]:
    """Read one YAML document.

    Args:
        source: the file's name, or the override's text.
        line: where everything is said to stand, in place of the lines of ``text``; for overrides.

    Returns:
        The document, and what is wrong with it: keys that stand twice, tags, syntax.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = Place(source, (mark.line + 1 if mark else 1) if line is None else line)
        return Located(None, where), [Problem(where, f"is not YAML: {error.problem or error.context}")]
    except yaml.YAMLError as error:
        where = Place(source, text.count("\n", 0, getattr(error, "position", 0)) + 1 if line is None else line)
        return Located(None, where), [Problem(where, f"is not YAML: {getattr(error, 'reason', error)}")]
    except RecursionError:
        where = Place(source, 1 if line is None else line)
        return Located(None, where), [Problem(where, f"is nested deeper than {MAX_DEPTH} levels")]
    if root is None:
        return Located(None, Place(source, 1 if line is None else line)), []
    builder = _Builder(source, line)
    return builder.build(root, builder.place(root), 0), builder.problems


def dump(value: Any) -> str:
    """``value`` as YAML that ``parse`` reads back to the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Builder:
    def __init__(self, source: str, line: int | None) -> None:
        self.source, self.line = source, line
        self.problems: list[Problem] = []
        self.values = 0

    def place(self, node: yaml.Node) -> Place:
        return Place(self.source, node.start_mark.line + 1 if self.line is None else self.line)

    def build(self, node: yaml.Node, place: Place, depth: int) -> Located:
        """``place`` is where the key of ``node`` stands."""
        self.values += 1
        if self.values == MAX_VALUES:
            self.problems.append(Problem(place, f"holds more than {MAX_VALUES} values"))
        if depth == MAX_DEPTH:
            self.problems.append(Problem(place, f"is nested deeper than {MAX_DEPTH} levels"))
        if self.values >= MAX_VALUES or depth >= MAX_DEPTH:
            return Located(None, place)
        match node:
            case yaml.MappingNode(tag="tag:yaml.org,2002:map"):
                return Located(self._mapping(node, depth), place)
            case yaml.SequenceNode(tag="tag:yaml.org,2002:seq"):
                return Located([self.build(item, self.place(item), depth + 1) for item in node.value], place)
            case yaml.ScalarNode():
                return Located(self._scalar(node), place)
        self.problems.append(Problem(place, f"has the tag {node.tag!r}; a recipe holds plain values only"))
        return Located(None, place)

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Located]:
        found: dict[str, Located] = {}
        for key_node, value_node in node.value:
            place = self.place(key_node)
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                said = repr(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a collection"
                self.problems.append(Problem(place, f"a key must be a word, not {said}"))
                continue
            if key in found:
                self.problems.append(
                    Problem(place, f"{key!r} stands twice; it is already on line {found[key].place.line}")
                )
                continue
            found[key] = self.build(value_node, place, depth + 1)
        return found

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text = node.value
        try:
            match node.tag.removeprefix("tag:yaml.org,2002:"):
                case "null":
                    return None
                case "bool":
                    return {"true": True, "false": False}[text.lower()]
                case "int":
                    return int(text)
                case "float":
                    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
                case "str":
                    return self._text(text, node)
        except (KeyError, ValueError):
            self.problems.append(Problem(self.place(node), f"{text[:40]!r} is not what its tag {node.tag!r} says"))
            return None
        self.problems.append(Problem(self.place(node), f"has the tag {node.tag!r}; a recipe holds plain values only"))
        return None

    def _text(self, text: str, node: yaml.Node) -> str:
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            self.problems.append(Problem(self.place(node), "holds a character that no text can hold"))
            return ""
        return text


def overlay(base: Located, patch: Located, problems: list[Problem], path: str = "") -> Located:
    """``base`` with what ``patch`` says instead: mappings merge deep, everything else is replaced.

    A mapping that names another `kind`, or another optimizer, replaces, for the old one's keys mean nothing to it. A
    mapping whose keys are all numbers changes a list's entries, which is how overrides reach them.
    """
    if isinstance(base.value, list) and _is_indexed(patch):
        return replace(base, value=_entries(base.value, patch.value, problems, path))
    if not (isinstance(base.value, dict) and isinstance(patch.value, dict)) or _another_kind(base, patch, path):
        return patch
    merged = dict(base.value)
    for key, below in patch.value.items():
        merged[key] = overlay(merged[key], below, problems, f"{path}{key}.") if key in merged else below
    return replace(base, value=merged)


def _is_indexed(patch: Located) -> bool:
    keys = patch.value if isinstance(patch.value, dict) else {}
    return bool(keys) and all(key.isdecimal() and len(key) < 6 for key in keys)


def _another_kind(base: Located, patch: Located, path: str) -> bool:
    key = "name" if path == "train.optimizer." else "kind"
    kinds = [mapping.value[key].value for mapping in (base, patch) if key in mapping.value]
    return len(kinds) == 2 and all(isinstance(kind, str) for kind in kinds) and kinds[0] != kinds[1]


def _entries(entries: list[Located], changes: dict[str, Located], problems: list[Problem], path: str) -> list[Located]:
    changed = list(entries)
    for key, below in changes.items():
        if int(key) < len(changed):
            changed[int(key)] = overlay(changed[int(key)], below, problems, f"{path}{key}.")
        else:
            problems.append(Problem(below.place, f"{path}{key} does not exist; there are {len(changed)}, from 0"))
    return changed
