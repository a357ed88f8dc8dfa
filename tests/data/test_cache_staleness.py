"""Whatever decides an encoding makes another one when it changes, and leaves alone all that it does not decide."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from taken_batches import Make

from finetune.data import images, prepare

Change = Callable[[Path, pytest.MonkeyPatch], dict[str, Any]]
"""Changes something and says what the recipe's ``data`` says from now on."""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (400, 20), (20 * index, 9, 9)).save(folder / f"{index}.bmp")
        (folder / f"{index}.txt").write_text(f"zib number {index}", encoding="utf-8")
    return folder


@pytest.fixture
def family(fake: Any) -> Callable[[], Any]:
    """Make a family whose networks' fingerprints are in the environment, a letter each."""

    class Parted(fake):  # type: ignore[misc]
        def fingerprint(self, *networks: str) -> str:
            return " ".join(os.environ.get(f"WEIGHTS_{name}", "a") for name in networks)

    return Parted


def overwritten(path: Path, content: bytes) -> None:
    """Other bytes, as many, of the same age."""
    before = path.stat()
    assert len(content) == before.st_size and content != path.read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def picture(folder: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    content = (folder / "1.bmp").read_bytes()
    overwritten(folder / "1.bmp", content[:-200] + bytes(200))
    return {}


def caption(folder: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    overwritten(folder / "1.txt", b"zib number 7")
    return {}


def image_encoder(_: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setenv("WEIGHTS_vae", "b")
    return {}


def text_encoder(_: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setenv("WEIGHTS_text_encoder", "b")
    return {}


def preprocessing(_: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(images, "VERSION", images.VERSION + 1)
    return {}


def moved(folder: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    (folder / "1.bmp").rename(folder / "7.bmp")
    (folder / "1.txt").rename(folder / "7.txt")
    return {}


def keys(**data: Any) -> Change:
    return lambda *_: data


@pytest.mark.parametrize(
    ("change", "pictures", "captions"),
    [
        pytest.param(picture, 1, 0, id="a picture's bytes"),
        pytest.param(caption, 0, 1, id="a caption"),
        pytest.param(moved, 0, 0, id="a picture's name, which decides nothing"),
        pytest.param(image_encoder, 3, 0, id="the image encoder"),
        pytest.param(text_encoder, 0, 3, id="the text encoder"),
        pytest.param(preprocessing, 3, 0, id="what is done to pictures"),
        pytest.param(keys(resolution=20), 3, 0, id="resolution"),
        pytest.param(keys(more_resolutions=[20]), 3, 0, id="one more resolution"),
        pytest.param(keys(buckets={"step": 4}), 3, 0, id="buckets"),
        pytest.param(keys(crop={"position": "random", "variants": 2}), 6, 0, id="place of the cut"),
        pytest.param(keys(flip=True), 3, 0, id="mirrors, which are added"),
        pytest.param(keys(cache={"dtype": "bfloat16"}), 3, 0, id="dtype"),
        pytest.param(keys(caption_dropout=0.5), 0, 1, id="the empty caption, which is added"),
    ],
)
def test_what_changes_is_made_anew_and_what_does_not_is_used(
    change: Change,
    pictures: int,
    captions: int,
    make_recipe: Make,
    photos: Path,
    family: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepare(make_recipe(photos), family())
    with monkeypatch.context() as patch:
        data = change(photos, patch)
        for expected in ((pictures, captions), (0, 0)):
            encoder = family()
            counts = prepare(make_recipe(photos, data=dict(data)), encoder).counts
            assert (encoder.pictures, len(encoder.captions)) == expected
            assert (counts["latents_made"], counts["prompts_made"]) == expected
    if change not in (picture, caption):
        before = family()
        prepare(make_recipe(photos), before)
        assert (before.pictures, before.captions) == (0, []), "what was made first is still there"


def test_more_variants_keep_those_that_are_there(make_recipe: Make, photos: Path, family: Callable[[], Any]) -> None:
    made = []
    for count in (2, 5):
        encoder = family()
        prepare(make_recipe(photos, data={"crop": {"position": "random", "variants": count}}), encoder)
        made.append(encoder.pictures)
    assert made == [6, 9]
