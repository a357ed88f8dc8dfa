"""What a plan says, as plain data that turns into JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from finetune.data.entries import Shape


@dataclass(frozen=True, kw_only=True)
class Concept:
    """Pictures that were found, decoded and checked.

    Attributes:
        source: as the recipe calls it.
        captions: where they come from -> how many pictures.
        example: one of the captions.
        smallest, largest: width and height in pixels, by area.
        masked: pictures with a mask.
        bytes: of the files.
    """

    source: str
    pictures: int
    repeats: int
    captions: dict[str, int]
    example: str
    smallest: tuple[int, int]
    largest: tuple[int, int]
    masked: int
    bytes: int
    trigger: str | None
    class_prompt: str | None


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How far the steps go.

    Attributes:
        subject_pictures, class_pictures: in each optimizer step, over all processes.
        draws_per_epoch: subject pictures, with their repeats.
        epochs: how often each of them is seen.
    """

    steps: int
    processes: int
    batch_size: int
    gradient_accumulation_steps: int
    subject_pictures: float
    class_pictures: float
    draws_per_epoch: int
    epochs: float


@dataclass(frozen=True, kw_only=True)
class ClassImages:
    """Pictures of one class prompt that the untouched model draws first; ``needed`` of them, ``present`` already."""

    prompt: str
    folder: str
    needed: int
    present: int


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Encodings that are kept: entries of one kind, how many are there already, and the size of all of them."""

    kind: str
    folder: str
    entries: int
    present: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """An estimate for one process, in bytes.

    Attributes:
        parts: of a step.
        formula: what they were counted from.
        host: of blocks that lie in the host's memory while a GPU trains. On a CPU they come on top.
        phases: before and after the steps, when other networks are in memory -> the most that is held.
    """

    parts: dict[str, int]
    formula: str
    host: int = 0
    phases: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Of a step."""
        return sum(self.parts.values())

    @property
    def most(self) -> int:
        """Of the phase that holds the most."""
        return max(self.total, *self.phases.values(), 0)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a run would need with a profile, and what a GPU of that profile has room for, in bytes."""

    profile: str
    bytes: int
    room: int


@dataclass(frozen=True, kw_only=True)
class Way:
    """What each process of a run would need under a launch profile.

    Attributes:
        launch: the profile's name.
        bytes: on the device, when it is most.
        phase: when that is: "a step", "encoding", "drawing".
        host: bytes in the host's memory.
        sent: bytes in a step.
        refused: why it cannot be.
    """

    launch: str
    bytes: int = 0
    phase: str = ""
    host: int = 0
    sent: int = 0
    refused: str | None = None


@dataclass(frozen=True, kw_only=True)
class Advice:
    """How to launch.

    Attributes:
        room: bytes that a process may take on its GPU; None where nothing says.
        ways: simple ones first.
        launch: which of them to take; None where none fits.
        command: that does it.
    """

    processes: int
    room: int | None
    ways: tuple[Way, ...]
    launch: str | None
    reason: str
    command: str | None


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where files will go.

    Attributes:
        state: what the folder holds now.
        files: what will be there at the end, relative to the folder.
    """

    folder: str
    state: str
    files: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All of it.

    Attributes:
        summary: the recipe in a line.
        networks: of the base model -> parameters.
        trainable: parameter group -> parameters; none where nothing is trained.
        shapes: in which pictures of concepts are cut, narrow ones first; none where pictures are not cut.
        arithmetic: None where no steps are taken.
        profile: what the recipe's profile has set.
        fits: with each profile; none where they were not asked for.
        advice: how to launch; None where no steps are taken.
        notes: what a person should know.
    """

    summary: str
    model: str
    family: str
    networks: dict[str, int]
    trainable: dict[str, int]
    concepts: tuple[Concept, ...]
    shapes: tuple[Shape, ...]
    arithmetic: Arithmetic | None
    class_images: tuple[ClassImages, ...]
    caches: tuple[Cache, ...]
    memory: Memory
    output: Output
    notes: tuple[str, ...]
    profile: dict[str, Any] = field(default_factory=dict)
    fits: tuple[Fit, ...] = ()
    advice: Advice | None = None
