"""What a shard means, and that no tar, however hostile, does more than be named."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packed import as_json, captions_of, contents, looked, tar
from PIL import Image

from finetune.data.origins.shards import expanded
from finetune.errors import UserError


def png(red: int = 0, size: tuple[int, int] = (16, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_members_of_a_key_are_one_sample(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "000.tar",
        [
            ("x/b.caption", b"another text of b"),
            ("x/b.txt", b"text of b"),
            ("x/b.jpg", png(1)),
            ("x/a.png", png(2)),
            ("x/a.json", as_json({"caption": "json of a", "url": "http://x"})),
            ("x/a.txt", b"text of a"),
            ("a.png", png(3)),
            ("a.depth.png", png(4)),
            ("a.json", as_json({"text": ["one", "two"]})),
            ("readme.md", b""),
        ],
    )
    found = looked(tmp_path / "cache", shards=str(path))
    assert found.problems == []
    told = {picture.id: picture.captions for picture in found.concepts[0].pictures}
    assert told == {
        "0/000.tar/a.png": ("one", "two"),
        "0/000.tar/x/a.png": ("json of a",),
        "0/000.tar/x/b.jpg": ("text of b",),
    }
    assert "2 entries ignored: a.depth.png, readme.md" in found.concepts[0].notes[0]
    sidecar = looked(tmp_path / "cache", shards=str(path), captions="sidecar", prompt="p")
    assert captions_of(sidecar) == ["p", "text of a", "text of b"]
    metadata = looked(tmp_path / "cache", shards=str(path), captions="metadata", prompt="p")
    assert captions_of(metadata) == ["one", "json of a", "p"]


def test_shards_of_one_name_stay_apart(tmp_path: Path) -> None:
    for part in ("train", "more"):
        tar(tmp_path / part / "0.tar", [("a.png", png())])
    found = looked(tmp_path / "cache", shards=[str(tmp_path / "train" / "0.tar"), str(tmp_path / "more")], prompt="p")
    assert [picture.id for picture in found.concepts[0].pictures] == ["0/train/0.tar/a.png", "0/more/0.tar/a.png"]


def test_masks_are_members_beside_the_pictures(tmp_path: Path) -> None:
    white = io.BytesIO()
    Image.new("L", (16, 16), 255).save(white, "PNG")
    members = [("a.png", png()), ("a.mask.png", white.getvalue()), ("b.png", png(1))]
    path = tar(tmp_path / "0.tar", members)
    found = looked(tmp_path / "cache", shards=str(path), masks="shards", prompt="p")
    assert [str(picture.mask) for picture in found.concepts[0].pictures] == [f"{path}:a.mask.png"]
    assert found.problems == [f"{path}:b.png: has no mask in its shard; expected b.mask.png"]


def test_an_index_is_kept_and_made_anew_when_the_tar_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    first = tarfile.open
    monkeypatch.setattr("tarfile.open", lambda *args, **keys: opened.append(1) or first(*args, **keys))
    path = tar(tmp_path / "0.tar", [("a.png", png())])
    opened.clear()

    def ids() -> list[str]:
        found = looked(tmp_path / "cache", shards=str(path), prompt="p")
        return [picture.id for picture in found.concepts[0].pictures]

    assert ids() == ids() == ["0/0.tar/a.png"]
    assert len(opened) == 1
    tar(path, [("b.png", png(1)), ("c.png", png(2))])
    assert ids() == ["0/0.tar/b.png", "0/0.tar/c.png"]


def entry(name: str, content: bytes = b"", **fields: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    padded = content + b"\0" * (-len(content) % 512)
    return info.tobuf(tarfile.GNU_FORMAT) + padded


GOOD = entry("a.png", png())
END = bytes(1024)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            GOOD + entry("b.png", type=tarfile.SYMTYPE, linkname="/etc/passwd") + END,
            "b.png: is a link to '/etc/passwd'",
        ),
        (GOOD + entry("b.png", type=tarfile.LNKTYPE, linkname="a.png") + END, "b.png: is a link to 'a.png'"),
        (GOOD + entry("b.png", type=tarfile.FIFOTYPE) + END, "b.png: is a device, a pipe"),
        (GOOD + entry("../b.png", png()) + END, "../b.png: has a name that leads out"),
        (GOOD + entry("/etc/b.png", png()) + END, "/etc/b.png: has a name that leads out"),
        (GOOD + entry("b\x1b[2J.png", png()) + END, "has control characters"),
        (GOOD + entry("b.png", png(1))[:-200], "b.png: the tar is broken or cut short here"),
        (GOOD + entry("b.png", png(1))[:300], "a.png: the tar is broken or cut short here"),
        (
            GOOD + entry("b.png", b"", size=1 << 60),
            "b.png: the tar is broken or cut short here: it is said to have 1152",
        ),
        (GOOD + entry("b.png", b"", size=-(1 << 20)), "broken or cut short here"),
        (GOOD + entry("././@LongLink", b"", type=tarfile.GNUTYPE_LONGNAME, size=1 << 50), "a header is said to have"),
        (GOOD + entry("././@PaxHeader", b"", type=tarfile.XHDTYPE, size=1 << 33), "a header is said to have"),
        (GOOD + GOOD + END, "a.png: stands in the shard twice"),
        (GOOD + entry("b.png", b"no picture") + END, "b.png: is not a picture"),
        (GOOD + entry("b.png", png()[:50]) + END, "b.png: is broken or cut short"),
        (GOOD + entry("a.json", b"{") + END, "a.json: is not JSON"),
        (GOOD + entry("a.txt", b"\xff\xfe") + END, "a.txt: is not UTF-8"),
        (GOOD + entry("a.json", b'{"text": 5}') + END, "a.json: text must be a caption"),
        (GOOD + entry("a.txt", b"x" * (2 << 20)) + END, "a.txt: has 2097152 bytes, far too many"),
        (GOOD + entry("b.x.png", png()) + entry("b.y.png", png()) + END, "b.x.png and b.y.png are one sample"),
        (GOOD, "a.png: the tar is broken or cut short here: no end"),
        (GOOD + b"x" * 512 + END, "a.png: the tar is broken or cut short here: no end"),
        (GOOD + END + GOOD + END, "it goes on behind its end"),
        (b"no tar at all" * 100, "0.tar: the tar is broken"),
        (b"\x1f\x8b\x08\x00" + bytes(600), "0.tar: is compressed"),
        (b"", "0.tar"),
        (END, "holds no pictures"),
    ],
)
def test_what_is_wrong_with_a_tar_is_named_with_shard_and_member(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(content)
    before = {file for file in tmp_path.rglob("*")}
    found = looked(tmp_path / "cache", shards=str(path), prompt="p")
    assert any(said in problem and str(path) in problem for problem in found.problems), found.problems
    assert {file for file in tmp_path.rglob("*") if "cache" not in file.parts} == before
    assert not list((tmp_path / "cache").rglob("*.png")) and not (tmp_path.parent / "b.png").exists()


def test_a_tar_that_changes_during_a_run_is_noticed(tmp_path: Path) -> None:
    path = tar(tmp_path / "0.tar", [("a.png", png())])
    (picture,) = looked(tmp_path / "cache", shards=str(path), prompt="p").concepts[0].pictures
    path.write_bytes(path.read_bytes()[:520])
    with pytest.raises(OSError, match="ends after 8 of"):
        picture.path.read_bytes()


def test_all_shards_are_looked_at_before_a_run_is_refused(tmp_path: Path, folder: Callable[..., Path]) -> None:
    tar(tmp_path / "s" / "0.tar", [("a.png", b"")])
    tar(tmp_path / "s" / "1.tar", contents(folder(2)))
    (tmp_path / "s" / "2.tar").write_bytes(b"\x1f\x8b\x08\x00" + bytes(600))
    found = looked(tmp_path / "cache", shards=str(tmp_path / "s" / "*.tar"))
    assert len(found.problems) == 2 and len(found.concepts[0].pictures) == 2


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{2..0}", ["2", "1", "0"]),
        ("s3://b/{a,b}-{0..1}.tar", ["s3://b/a-0.tar", "s3://b/a-1.tar", "s3://b/b-0.tar", "s3://b/b-1.tar"]),
        ("{x}.tar", ["{x}.tar"]),
    ],
)
def test_braces_name_what_a_shell_would(pattern: str, names: list[str]) -> None:
    assert expanded(pattern) == names


@pytest.mark.parametrize("pattern", ["{0..999999999999}", "{0..999}{0..999}"])
def test_braces_without_end_are_refused(pattern: str) -> None:
    with pytest.raises(UserError, match="at most 100000"):
        expanded(pattern)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    tar(tmp_path / "000.tar", [("a.png", png())])
    cases = {"00.tar": "did you mean '000.tar'", "{000..001}.tar": "001.tar does not exist", "x*": "matches no file"}
    for pattern, said in cases.items():
        found = looked(tmp_path / "cache", shards=str(tmp_path / pattern), prompt="p")
        assert said in found.problems[0] and "data.concepts[0].shards" in found.problems[0]
