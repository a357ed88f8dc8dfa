"""Every kind of picture file becomes the same upright RGB picture, or an error that says what is wrong."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from finetune.data import decoding
from finetune.errors import UserError


def reread(image: Image.Image, path: Path, **options: object) -> Image.Image:
    image.save(path, **options)
    return decoding.rgb(decoding.decode(path.read_bytes(), path))


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"),
    [("RGB", "png", 0), ("RGB", "bmp", 0), ("P", "gif", 40), ("P", "png", 40), ("CMYK", "tif", 2), ("CMYK", "jpg", 40)],
)
def test_colours_survive_every_mode(
    gradient: Image.Image, tmp_path: Path, mode: str, suffix: str, tolerance: int
) -> None:
    image = gradient.quantize(64) if mode == "P" else gradient.convert(mode)
    read = reread(image, tmp_path / f"a.{suffix}")
    assert read.mode == "RGB"
    assert np.abs(np.asarray(read, int) - np.asarray(gradient, int)).max() <= tolerance


def test_grey_16_bit_and_grey_8_bit_agree(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    wide = reread(Image.fromarray(grey.astype(np.uint16) * 257), tmp_path / "wide.png")
    narrow = reread(Image.fromarray(grey), tmp_path / "narrow.png")
    assert wide.tobytes() == narrow.tobytes() == np.repeat(grey[..., None], 3, -1).tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_over_white(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (8, 8), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
    image.paste((10, 10, 10, 255) if mode == "RGBA" else (10, 255), (0, 0, 4, 8))
    read = reread(image, tmp_path / "a.png")
    assert read.getpixel((0, 0)) == (10, 10, 10)
    assert read.getpixel((7, 0)) == (255, 255, 255)


def test_a_transparent_palette_colour_lies_over_white(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.paste(1, (0, 0, 4, 8))
    read = reread(image, tmp_path / "a.gif", transparency=0)
    assert read.getpixel((0, 0)) == (0, 0, 200)
    assert read.getpixel((7, 7)) == (255, 255, 255)


def test_a_photograph_on_its_side_is_set_upright(gradient: Image.Image, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    path = tmp_path / "a.png"
    gradient.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    assert decoding.rgb(decoding.decode(path.read_bytes(), path)).tobytes() == gradient.tobytes()
    facts = decoding.inspect(path)
    assert (facts.width, facts.height) == gradient.size


def test_the_first_frame_of_an_animation_counts(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    path = tmp_path / "a.gif"
    first.save(path, save_all=True, append_images=[second])
    assert decoding.rgb(decoding.decode(path.read_bytes(), path)).getpixel((3, 3)) == (255, 0, 0)
    assert decoding.inspect(path).frames == 2


def test_a_colour_profile_is_converted_and_a_broken_one_ignored(gradient: Image.Image, tmp_path: Path) -> None:
    lab_like = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    same = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (b"no profile at all", same):
        assert reread(gradient, tmp_path / "a.png", icc_profile=profile).tobytes() == gradient.tobytes()
    reread(gradient, tmp_path / "a.png", icc_profile=lab_like)  # whatever it means, it must not stop a run


def truncated_jpeg(path: Path) -> None:
    content = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(content, "JPEG")
    path.write_bytes(content.getvalue()[: len(content.getvalue()) // 2])


def broken_png(path: Path) -> None:
    content = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(content, "PNG")
    path.write_bytes(content.getvalue()[:300])


def bomb(path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    )


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated jpeg": ("a.jpg", truncated_jpeg, "broken or cut short"),
    "truncated png": ("a.png", broken_png, "broken or cut short"),
    "text": (
        "a.png",
        lambda path: path.write_text("hello world, I am a text"),
        "is not a picture; it begins with b'he",
    ),
    "empty file": ("a.png", lambda path: path.write_bytes(b""), "is not a picture"),
    "bomb": ("a.png", bomb, "is too large; expected at most 178 million pixels"),
    "icon": ("a.png", lambda path: Image.new("RGB", (7, 300)).save(path), "7 x 300 pixels; expected at least 8"),
    "float": ("a.tif", lambda path: Image.new("F", (16, 16)).save(path), "colours of kind 'F'"),
    "lab": ("a.tif", lambda path: Image.new("LAB", (16, 16)).save(path), "colours of kind 'LAB'"),
    "missing": ("a.png", lambda path: None, "cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_say_what_is_wrong(case: str, tmp_path: Path) -> None:
    name, write, message = BAD[case]
    write(tmp_path / name)
    with pytest.raises(UserError, match=name) as caught:
        decoding.inspect(tmp_path / name)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 100}])
def test_a_jpeg_is_found_broken_wherever_it_is_cut_though_facts_need_no_pixels(
    tmp_path: Path, options: dict[str, object]
) -> None:
    path = tmp_path / "a.jpg"
    Image.effect_noise((70, 50), 90).convert("RGB").save(path, **options)  # type: ignore[arg-type]
    whole = path.read_bytes()
    for end in range(10, len(whole) + 1, len(whole) // 40):
        told = []
        for look in (decoding.decode, lambda content, path: decoding.facts(content, "", path)):
            try:
                look(whole[:end], path)
                told.append("")
            except UserError as error:
                told.append(str(error))
        assert told[0] == told[1], end
    assert (decoding.inspect(path).width, decoding.inspect(path).height) == (70, 50)


@pytest.mark.parametrize("side", [1, 6])
def test_a_smaller_jpeg_shows_the_same_upright(side: int, tmp_path: Path, gradient: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = side
    path = tmp_path / "a.jpg"
    stored = gradient.resize((320, 160)) if side == 1 else gradient.resize((320, 160)).transpose(2)
    stored.save(path, exif=exif, quality=95)
    small = decoding.decode(path.read_bytes(), path, shrink=4)
    assert small.size == (80, 40)
    expected = np.asarray(decoding.decode(path.read_bytes(), path).resize((80, 40), Image.Resampling.BOX), int)
    assert np.abs(np.asarray(small, int) - expected).max() <= 3
    facts = decoding.inspect(path)
    assert (facts.width, facts.height) == (320, 160)


def test_warnings_are_as_they_were_after_threads_have_decoded(tmp_path: Path, gradient: Image.Image) -> None:
    path = tmp_path / "a.png"
    gradient.save(path)
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(decoding.inspect, [path] * 200))) == 1
    assert warnings.filters == before
