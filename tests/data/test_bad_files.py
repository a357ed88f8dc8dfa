"""Hundreds of bad files in one folder: none crashes, each is named with its reason, and memory stays small."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from finetune.config.schema import ConceptConfig, DataConfig
from finetune.data import scan
from finetune.data.sources import Survey, survey
from finetune.errors import UserError

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "tif": "TIFF", "bmp": "BMP", "avif": "AVIF"}


def encoded(kind: str) -> bytes:
    image = Image.radial_gradient("L").resize((96, 64)).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def bomb(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100_000)) + chunk(b"IEND", b"")


def truncated() -> Iterator[tuple[str, bytes]]:
    """Every format cut at every 2 % of its length."""
    for suffix, kind in FORMATS.items():
        whole = encoded(kind)
        for percent in range(0, 100, 2):
            yield f"cut-{percent:02}.{suffix}", whole[: len(whole) * percent // 100]


def damaged() -> Iterator[tuple[str, bytes]]:
    """Every format with bytes changed here and there, and PNGs whose checksums are wrong."""
    rng = random.Random(0)
    for suffix, kind in FORMATS.items():
        for number in range(25):
            content = bytearray(encoded(kind))
            for _ in range(1 + number):
                content[rng.randrange(len(content))] = rng.randrange(256)
            yield f"changed-{number:02}.{suffix}", bytes(content)
    whole = encoded("PNG")
    for place in range(8):
        content = bytearray(whole)
        content[whole.index(b"IDAT") - 5 - place * 2] ^= 0xFF
        yield f"crc-{place}.png", bytes(content)


def others() -> Iterator[tuple[str, bytes]]:
    yield "huge.png", bomb(60_000, 60_000)
    yield "wide.png", bomb(2**31 - 1, 1)
    yield "flat.png", bomb(100_000, 2)
    yield "empty.png", b""
    yield "text.jpg", b"this is no picture"
    yield "script.webp", b"#!/bin/sh\nrm -rf /\n"
    yield "zeros.gif", bytes(4096)
    yield "svg.png", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"
    yield "zip.png", b"PK\x03\x04" + bytes(60)


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder, and how many files were written into it."""
    folder = tmp_path_factory.mktemp("bad")
    count = 0
    for name, content in (*truncated(), *damaged(), *others()):
        (folder / name).write_bytes(content)
        count += 1
    (folder / "loop-a.png").symlink_to(folder / "loop-b.png")
    (folder / "loop-b.png").symlink_to(folder / "loop-a.png")
    (folder / "nowhere.png").symlink_to(folder / "not there")
    (folder / "folder.png").mkdir()
    (folder / os.fsdecode(b"name-\xff.png")).write_bytes(encoded("PNG"))
    captions = {
        "nul": b"a\0b",
        "long": b"a dog, " * 150_000,
        "latin": "h\xe4user".encode("latin-1"),
        "utf16": "a dog".encode("utf-16"),
        "binary": bytes(range(256)),
    }
    for name, caption in captions.items():
        (folder / f"caption-{name}.png").write_bytes(encoded("PNG"))
        (folder / f"caption-{name}.txt").write_bytes(caption)
    return folder, count + 5 + 1


def surveyed(folder: Path) -> Survey:
    return survey(DataConfig(concepts=[ConceptConfig(folder=str(folder), prompt="a dog")]))


def test_every_bad_file_is_listed_with_its_reason_and_none_is_passed_over(bad: tuple[Path, int]) -> None:
    folder, count = bad
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = surveyed(folder)
    risen = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert count > 500
    pictures = [picture.path.name for concept in found.concepts for picture in concept.pictures]
    named = {problem.split(": ")[0].strip("'").rpartition("/")[2] for problem in found.problems}
    stems = {name.partition(".txt")[0].partition(".png")[0] for name in named}
    written = {path.name for path in folder.iterdir() if path.suffix != ".txt" and path.is_file()}
    lost = {name for name in written if name not in pictures and name not in named and Path(name).stem not in stems}
    assert {name.encode(errors="replace") for name in lost} <= {b"name-?.png"}
    assert len(found.problems) + len(pictures) == count
    assert all(": " in problem and len(problem) < 500 for problem in found.problems)
    assert risen < 200 * 1024, f"{risen} kB"


def test_what_is_passed_on_is_whole(bad: tuple[Path, int]) -> None:
    """Changed bytes may leave a picture that can be read; a cut one never counts as whole."""
    pictures = [picture for concept in surveyed(bad[0]).concepts for picture in concept.pictures]
    assert not [picture.path.name for picture in pictures if picture.path.name.startswith(("cut", "caption"))]
    for picture in pictures:
        assert picture.facts.width >= 8 and picture.facts.height >= 8


def test_links_that_lead_nowhere_and_folders_are_counted_as_ignored(bad: tuple[Path, int]) -> None:
    notes = " ".join(note for concept in surveyed(bad[0]).concepts for note in concept.notes)
    assert "4 entries ignored" in notes


def test_a_run_stops_and_lists_them(bad: tuple[Path, int]) -> None:
    with pytest.raises(UserError, match=r"things are wrong with the pictures:") as error:
        scan(DataConfig(concepts=[ConceptConfig(folder=str(bad[0]), prompt="a dog")]))
    assert str(error.value).count("\n") <= 41 and "more" in str(error.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"file_name": "../a.png", "text": "x"}', "must be a path inside the folder"),
        ('{"file_name": "/etc/passwd", "text": "x"}', "must be a path inside the folder"),
        ('{"file_name": "a\\u0000.png", "text": "x"}', "there is no a"),
        ('{"file_name": "a.png", "text": "x\\u0000y"}', "NUL character"),
        ('{"file_name": "a.png", "text": "\\ud800"}', "surrogate"),
        ('{"file_name": "a.png", "text": ' + "[" * 100_000, "is not JSON"),
        ('{"file_name": "a.png", "text": ' + "9" * 10_000 + "}", "is not JSON that can be read"),
        ('{"file_name": "a.png", "text": 7}', "must be a caption"),
        (json.dumps({"file_name": "a.png", "text": "y" * 10**6}), "1000000 characters long"),
    ],
)
def test_a_bad_line_of_metadata_is_named(line: str, reason: str, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(f"{line}\n", encoding="utf-8")
    problems = survey(DataConfig(concepts=[ConceptConfig(folder=str(tmp_path), prompt="a dog")])).problems
    assert len(problems) == 1 and "metadata.jsonl:1: " in problems[0] and reason in problems[0]
