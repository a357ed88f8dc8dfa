"""YAML with positions: the scalars of YAML 1.2, duplicate keys, and files made to hurt."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config.document import Place, dump, overlay, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),  # YAML 1.1 reads text
        ("1.5E+3", 1500.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("no", "no"),  # YAML 1.1 reads false
        ("on", "on"),
        ("12:30", "12:30"),  # YAML 1.1 reads 750
        ("2024-01-01", "2024-01-01"),  # YAML 1.1 reads a date
        ("010", 10),  # YAML 1.1 reads 8
        ("true", True),
        ("~", None),
        ("", None),
        ("'1e-4'", "1e-4"),
        ("[a, 1, {b: 2}]", ["a", 1, {"b": 2}]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found, problems = parse(f"key: {text}", "file")
    assert not problems
    assert found.plain() == {"key": value}
    assert type(found.plain()["key"]) is type(value)


def test_every_key_knows_its_line() -> None:
    found, _ = parse("a: 1\nb:\n  c: 2\n  d:\n  - 3\n  -\n    e: 4\n", "file")
    below = found.below("b")
    assert below is not None and below.place == Place("file", 2)
    assert [item.place.line for item in below.value["d"].value] == [5, 7]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "'a' stands twice; it is already on line 1"),
        ("a: 1\nb: [1, 2\n", 3, "is not YAML"),
        ("a: 1\n\tb: 2\n", 2, "is not YAML"),
        ("a: 1\n5: 2\n", 2, "a key must be a word, not '5'"),
        ("a: 1\n[x]: 2\n", 2, "a key must be a word"),
        ("a: !!python/object/apply:os.system [ls]\n", 1, "plain values only"),
        ("a: !thing {}\n", 1, "plain values only"),
        ("a: !!int x\n", 1, "is not what its tag"),
        ("a: *nobody\n", 1, "is not YAML"),
        ("a: 1\n---\nb: 2\n", 2, "is not YAML"),
        ('a: "\\0"\n', 1, "no text can hold"),
        ('a: "\\ud800"\n', 1, "no text can hold"),
        ("a: 1\nb: \x01\n", 2, "is not YAML"),
        ("a: " + "[" * 60 + "]" * 60, 1, "nested deeper"),
        ("[" * 5000, 1, "nested deeper"),
        ("a: &a [*a]\n", 1, "nested deeper"),
        ("a: " + "9" * 5000, 1, "is not what its tag"),
    ],
)
def test_mistakes_have_a_line(text: str, line: int, said: str) -> None:
    _, problems = parse(text, "file")
    assert problems
    assert problems[0].place == Place("file", line)
    assert said in problems[0].text


def test_aliases_cannot_blow_a_small_file_up() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    _, problems = parse("\n".join(lines), "file")
    assert ["holds more than" in problem.text for problem in problems] == [True]


SCALARS = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=False) | st.text(max_size=12)
TRICKY = st.sampled_from(
    ["no", "1e5", "1e-4", "010", "12:30", "~", "", "null", ".inf", "- a", "a: b", "#", "'", "0x1f"]
)
VALUES = st.recursive(
    SCALARS | TRICKY, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TRICKY | st.text(), inner, max_size=3)
)


def sound(value: object) -> bool:
    """No text that YAML cannot hold."""
    if isinstance(value, dict):
        return all(sound(key) and sound(below) for key, below in value.items())
    if isinstance(value, list):
        return all(map(sound, value))
    return not isinstance(value, str) or ("\0" not in value and value.isprintable())


@settings(max_examples=200, deadline=None)
@given(VALUES.filter(sound))
def test_what_is_dumped_reads_back_equal(value: object) -> None:
    found, problems = parse(dump({"key": value}), "file")
    assert not problems
    assert found.plain() == {"key": value}


def laid_over(base: str, patch: str) -> tuple[object, list[str]]:
    problems: list = []
    found = overlay(parse(base, "base")[0], parse(patch, "patch")[0], problems)
    return found.plain(), [problem.text for problem in problems]


def test_mappings_merge_deep_and_lists_are_replaced() -> None:
    assert laid_over("{a: {b: 1, c: [1, 2]}, d: 4}", "{a: {c: [3]}, e: 5}")[0] == {
        "a": {"b": 1, "c": [3]},
        "d": 4,
        "e": 5,
    }


def test_another_kind_replaces_its_section() -> None:
    assert laid_over("{a: {kind: lora, rank: 4}}", "{a: {kind: full}}")[0] == {"a": {"kind": "full"}}
    assert laid_over("{a: {kind: lora, rank: 4}}", "{a: {alpha: 1}}")[0] == {
        "a": {"kind": "lora", "rank": 4, "alpha": 1}
    }


def test_numbers_reach_the_entries_of_a_list() -> None:
    assert laid_over("{a: [{b: 1}, {b: 2}]}", "{a: {'1': {b: 3}}}")[0] == {"a": [{"b": 1}, {"b": 3}]}
    assert laid_over("{a: [1]}", "{a: {'3': 3}}")[1] == ["a.3 does not exist; there are 1, from 0"]
    assert laid_over("{a: [1]}", "{a: {}}")[0] == {"a": {}}
