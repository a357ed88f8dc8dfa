"""Points and boxes that show a model where the subject is: options, or a line for each picture. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError, nearest

Point = tuple[float, float]
Box = tuple[float, float, float, float]
EXAMPLE = {2: "120,80 or 0.5,0.5", 4: "40,20,300,280"}
KEYS = ("file_name", "points", "labels", "box")


@dataclass(frozen=True)
class Prompt:
    """Where the subject is.

    Attributes:
        points: x and y from the upper left.
        labels: of each point: 1 on the subject, 0 beside it.
        box: left, top, right and bottom of what holds the subject.
    """

    points: tuple[Point, ...] = ()
    labels: tuple[int, ...] = ()
    box: Box | None = None

    def in_pixels(self, width: int, height: int, where: str) -> Prompt:
        """The prompt in pixels of a picture.

        A point or box whose numbers are all 1 at most is in fractions of width and height.

        Args:
            where: it was said, for messages.

        Raises:
            UserError: something lies outside the picture.
        """
        size = (width, height)
        points = tuple(_point(_pixels(point, size, where)) for point in self.points)
        box = None if self.box is None else _box(_pixels(self.box, size, where))
        if box and (box[0] >= box[2] or box[1] >= box[3]):
            raise UserError(f"{where}: the box {_text(box)} is empty; expected left,top,right,bottom")
        return Prompt(points, self.labels, box)


def parse(points: str | None, negative: str | None, box: str | None) -> Prompt | None:
    """A prompt from words of the command line, such as "120,80 0.5,0.5"; None where nothing was said.

    Raises:
        UserError: these are no numbers, or not as many as are needed.
    """
    on, beside = _points(points, "--points"), _points(negative, "--negative")
    corners = None if box is None else _numbers(box, 4, "--box")
    if not on and not beside and corners is None:
        return None
    labels = (1,) * len(on) + (0,) * len(beside)
    return Prompt((*on, *beside), labels, None if corners is None else _box(corners))


def read_prompts(path: Path, names: Sequence[str]) -> dict[str, Prompt]:
    """Prompts by the name of the picture's file, from lines of JSON.

    Args:
        names: of the pictures that there are.

    Raises:
        UserError: the file cannot be read, or a line is wrong or names no picture or one a second time.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    found: dict[str, Prompt] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        name, prompt = _line(line, where)
        if name not in names:
            raise UserError(f"{where}: there is no picture {name!r}{nearest(name, list(names)[:20])}")
        if name in found:
            raise UserError(f"{where}: {name!r} has a line already; give all its points in one")
        found[name] = prompt
    return found


def _line(line: str, where: str) -> tuple[str, Prompt]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: is not JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise UserError(f'{where}: expected {{"file_name": "a.jpg", "points": [[x, y]], "labels": [1], "box": [...]}}')
    for key in row:
        if key not in KEYS:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, KEYS)}")
    points = tuple(_point(_json_numbers(point, 2, f"{where}: points")) for point in _list(row, "points", where))
    labels = tuple(_list(row, "labels", where)) or (1,) * len(points)
    if len(labels) != len(points) or not all(type(one) is int and one in (0, 1) for one in labels):
        raise UserError(f"{where}: labels: expected a 1 (on the subject) or 0 (beside it) for each of the points")
    box = None if row.get("box") is None else _box(_json_numbers(row["box"], 4, f"{where}: box"))
    if not points and box is None:
        raise UserError(f"{where}: has neither points nor a box")
    return row["file_name"], Prompt(points, labels, box)


def _list(row: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = row.get(key) or []
    if not isinstance(value, list):
        raise UserError(f"{where}: {key}: expected a list, found {value!r}")
    return value


def _json_numbers(value: Any, count: int, where: str) -> list[float]:
    if not isinstance(value, list) or len(value) != count or not all(type(one) in (int, float) for one in value):
        raise UserError(f"{where}: expected {count} numbers, found {value!r}")
    return [float(one) for one in value]


def _points(text: str | None, option: str) -> list[Point]:
    return [_point(_numbers(word, 2, option)) for word in (text or "").split()]


def _numbers(word: str, count: int, option: str) -> list[float]:
    try:
        numbers = [float(part) for part in word.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise UserError(
            f"{option} {word!r}: expected {count} numbers with commas between them, such as {EXAMPLE[count]}"
        )
    return numbers


def _point(numbers: Sequence[float]) -> Point:
    return numbers[0], numbers[1]


def _box(numbers: Sequence[float]) -> Box:
    return numbers[0], numbers[1], numbers[2], numbers[3]


def _pixels(place: Sequence[float], size: tuple[int, int], where: str) -> list[float]:
    """Numbers for width and height in turn, in pixels."""
    sides = size * (len(place) // 2)
    fractions = all(0 <= value <= 1 for value in place)
    pixels = [value * side if fractions else value for value, side in zip(place, sides, strict=True)]
    if not all(0 <= value <= side for value, side in zip(pixels, sides, strict=True)):
        raise UserError(f"{where}: {_text(place)} lies outside the picture of {size[0]} x {size[1]} pixels")
    return pixels


def _text(place: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in place)
