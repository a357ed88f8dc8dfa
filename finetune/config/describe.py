"""The schema in words: what a value must be, which sections there are, and where a key belongs."""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import Tag
from pydantic.fields import FieldInfo

from finetune.config.schema import Recipe
from finetune.config.section import Section, fields

_NOUN = re.compile(r"^an? (.*?)(integer|number)")  # of "a positive integer", "a number from 0 to below 1"


@dataclass(frozen=True)
class Listed:
    """A section of the schema.

    Attributes:
        path: dotted, "" for the recipe itself; entries of a list share one path.
        kind: which of several kinds of section this is, where there are several.
        repeated: the section is an entry of a list.
    """

    path: str
    kind: str | None
    section: type[Section]
    repeated: bool = False


def sections(section: type[Section] = Recipe, path: str = "", repeated: bool = False) -> Iterator[Listed]:
    """Every section of a recipe, from the top down, in the order of the schema."""
    yield Listed(path, kind_of(section), section, repeated)
    for name, field in fields(section).items():
        inner = element(field.annotation)
        for option in options(inner or field.annotation):
            if is_section(option):
                yield from sections(option, f"{path}.{name}".lstrip("."), inner is not None)


def owners(key: str) -> list[Listed]:
    """The sections that have ``key``."""
    return [listed for listed in _every_section() if key in fields(listed.section)]


def kinds(annotation: Any) -> dict[str, type[Section]]:
    """The sections that may stand where ``annotation`` does, by what chooses them; empty where there is one or none."""
    return {kind: option for option in options(annotation) if is_section(option) and (kind := kind_of(option))}


def kind_of(section: type[Section]) -> str | None:
    """What a section says of itself under the key that chooses it, an example where that may be many things."""
    field = section.model_fields.get(section.chosen_by)
    if field is None:
        return None
    return str((*get_args(field.annotation), *(field.examples or []))[0])


def chosen_by(annotation: Any) -> str:
    """The key by which one of ``kinds`` is chosen."""
    return next(iter(kinds(annotation).values())).chosen_by


def is_section(annotation: Any) -> bool:
    """Whether a mapping with keys of its own stands there."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def options(annotation: Any) -> list[Any]:
    """The members of a union without None; the annotation itself where it is no union."""
    annotation, metadata = _bare(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        members = [option for option in get_args(annotation) if option is not types.NoneType]
        return options(members[0]) if len(members) == 1 else [_untagged(option) for option in members]
    return [Annotated[annotation, *metadata] if metadata else annotation]


def element(annotation: Any) -> Any:
    """What a list holds; None where ``annotation`` is no list."""
    for option in options(annotation):
        bare, _ = _bare(option)
        if get_origin(bare) is list:
            return get_args(bare)[0]
    return None


def entry(annotation: Any) -> Any:
    """What a mapping with free keys holds; None where ``annotation`` is no such mapping."""
    bare, _ = _bare(annotation)
    return get_args(bare)[1] if get_origin(bare) is dict else None


def wanted(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a value must be: "a positive integer", "one of no, fp16, bf16"."""
    bare, more = _bare(annotation)
    limits = _limits([*metadata, *more])
    choices = options(bare)
    if len(choices) > 1 or choices[0] is not bare:
        if named := kinds(bare):
            return f"a section with `{chosen_by(bare)}` ({', '.join(named)})"
        return " or ".join(wanted(choice, metadata) for choice in choices)
    if get_origin(bare) is Literal:
        names = ", ".join(map(str, get_args(bare)))
        return f"one of {names}" if len(get_args(bare)) > 1 else names
    if get_origin(bare) is list:
        return f"a list of {_plural(get_args(bare)[0])}{', at least one' if limits.get(MinLen) else ''}"
    if get_origin(bare) is tuple:
        return f"a list of {len(get_args(bare))}, each {wanted(get_args(bare)[0])}"
    if get_origin(bare) is dict:
        return f"a section whose values are each {wanted(get_args(bare)[1])}"
    if is_section(bare):
        return "a section of keys"
    return {bool: "true or false", str: "text"}.get(bare) or _number("integer" if bare is int else "number", limits)


def wanted_of(field: FieldInfo) -> str:
    """What the value of a field must be."""
    return wanted(field.annotation, field.metadata)


@functools.cache
def _every_section() -> tuple[Listed, ...]:
    return tuple(sections())


def _bare(annotation: Any) -> tuple[Any, list[Any]]:
    """An annotation and what ``Annotated`` adds to it."""
    if get_origin(annotation) is not Annotated:
        return annotation, []
    bare, *metadata = get_args(annotation)
    flat = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
    return bare, flat


def _untagged(option: Any) -> Any:
    """A member of a union without the name that pydantic finds it under."""
    bare, metadata = _bare(option)
    return bare if any(isinstance(part, Tag) for part in metadata) else option


def _limits(metadata: Sequence[Any]) -> dict[type, Any]:
    names = {Gt: "gt", Ge: "ge", Lt: "lt", Le: "le", MinLen: "min_length"}
    return {type(limit): getattr(limit, names[type(limit)]) for limit in metadata if type(limit) in names}


def _number(noun: str, limits: Mapping[type, Any]) -> str:
    article = "an" if noun == "integer" else "a"
    low, high = limits.get(Ge), limits.get(Le, limits.get(Lt))
    if limits.get(Gt) == 0 and high is None:
        return f"a positive {noun}"
    if low is not None and high is not None:
        return f"{article} {noun} from {low:g} to {'' if Le in limits else 'below '}{high:g}"
    if low == 0:
        return f"0 or a positive {noun}"
    return f"{article} {noun}" + (f" of at least {low:g}" if low is not None else "")


def _plural(annotation: Any) -> str:
    bare, _ = _bare(annotation)
    if get_origin(bare) is Literal:
        return f"any of {', '.join(map(str, get_args(bare)))}"
    return "texts" if bare is str else "sections" if is_section(bare) else _NOUN.sub(r"\1\2s", wanted(annotation))
