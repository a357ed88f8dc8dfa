"""What every source of pictures finds. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from finetune.data.places import Place


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture of a source with what belongs to it, none of it decoded yet.

    Attributes:
        name: within the concept, the same wherever the source lies; it names the picture's randomness.
        picture: the file.
        captions: from metadata or a column.
        beside: the text file of this picture alone.
        mask: its mask, where the source itself has one.
    """

    name: str
    picture: Place
    captions: tuple[str, ...] = ()
    beside: Place | None = None
    mask: Place | None = None


@dataclass(frozen=True, slots=True)
class Finds:
    """All of a source.

    Attributes:
        samples: in the source's order.
        problems: what is wrong, each with its place.
        ignored: names of what is neither a picture nor belongs to one.
    """

    samples: list[Sample]
    problems: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
