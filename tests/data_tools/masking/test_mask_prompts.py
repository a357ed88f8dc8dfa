"""Points and boxes as they are said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools.masking.prompts import Prompt, parse, read_prompts
from finetune.errors import UserError


def test_options_and_lines_say_the_same(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.jsonl"
    row = {
        "file_name": "a.jpg",
        "points": [[120, 80], [0.5, 0.25], [3, 4]],
        "labels": [1, 1, 0],
        "box": [0, 1, 200, 90],
    }
    lines.write_text(json.dumps(row) + "\n\n" + json.dumps({"file_name": "b.jpg", "points": [[5, 6]]}))
    found = read_prompts(lines, ["a.jpg", "b.jpg", "c.jpg"])
    assert found["a.jpg"] == parse("120,80 0.5,0.25", "3,4", "0,1,200,90")
    assert found["b.jpg"] == Prompt(((5, 6),), (1,))
    assert parse(None, None, None) is None


def test_fractions_become_pixels() -> None:
    prompt = Prompt(((0.5, 0.25), (120, 80), (1, 1)), (1, 1, 0), (0.25, 0, 1, 0.5))
    assert prompt.in_pixels(200, 100, "a") == Prompt(((100, 25), (120, 80), (200, 100)), (1, 1, 0), (50, 0, 200, 50))


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (Prompt(((201, 5),), (1,)), r"a.jpg: 201,5 lies outside the picture of 200 x 100 pixels"),
        (Prompt(((-3, 5),), (1,)), r"-3,5 lies outside"),
        (Prompt(box=(50, 10, 50, 20)), r"the box 50,10,50,20 is empty"),
    ],
)
def test_what_lies_outside_is_said(prompt: Prompt, said: str) -> None:
    with pytest.raises(UserError, match=said):
        prompt.in_pixels(200, 100, "a.jpg")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"prompts.jsonl:2: is not JSON"),
        ('{"points": [[1, 2]]}', r":2: expected .*file_name"),
        ('{"file_name": "a.jgp", "points": [[1, 2]]}', r":2: there is no picture 'a.jgp'; did you mean 'a.jpg'\?"),
        ('{"file_name": "b.jpg", "points": [[1, 2]]}', r":2: 'b.jpg' has a line already"),
        ('{"file_name": "a.jpg", "point": [[1, 2]]}', r":2: unknown key 'point'; did you mean 'points'\?"),
        ('{"file_name": "a.jpg", "points": [[1]]}', r":2: points: expected 2 numbers, found \[1\]"),
        ('{"file_name": "a.jpg", "points": [[1, 2]], "labels": [2]}', r":2: labels: expected a 1"),
        ('{"file_name": "a.jpg", "points": [[1, 2]], "labels": [[]]}', r":2: labels: expected a 1"),
        ('{"file_name": "a.jpg", "points": [[1, 2]], "labels": [1, 0]}', r":2: labels: expected a 1"),
        ('{"file_name": "a.jpg", "box": [1, 2, 3]}', r":2: box: expected 4 numbers"),
        ('{"file_name": "a.jpg"}', r":2: has neither points nor a box"),
        ('{"file_name": "a.jpg", "points": 3}', r":2: points: expected a list, found 3"),
    ],
)
def test_a_bad_line_is_named(line: str, said: str, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"file_name": "b.jpg", "box": [1, 2, 3, 4]}\n' + line)
    with pytest.raises(UserError, match=said):
        read_prompts(lines, ["a.jpg", "b.jpg"])


@pytest.mark.parametrize(("points", "box"), [("1;2", None), ("1,2,3", None), ("1,x", None), (None, "1,2,3")])
def test_bad_options_are_said(points: str | None, box: str | None) -> None:
    with pytest.raises(UserError, match=r"--(points|box) '.*': expected \d numbers"):
        parse(points, None, box)
