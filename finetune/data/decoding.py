"""Picture files to upright 8 bit RGB, with every way in which a file can be bad said in a sentence. No torch."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from threading import Lock

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from finetune.data.places import Place
from finetune.errors import UserError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"})
DEEP = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N"})  # 16 bit grey, in the names of Pillow's versions
MODES = DEEP | {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
SMALLEST_SIDE = 8  # pixels; anything smaller is an icon or a mistake
SHRINKS = (8, 4, 2)  # what a JPEG's blocks can be decoded to a part of


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a picture file once it has been decoded whole.

    Attributes:
        sha256: of the file's bytes.
        bytes: size of the file.
        width, height: in pixels, upright.
        transparent: whether it has an alpha channel or a transparent colour.
        frames: more than one in an animation, of which the first counts.
    """

    sha256: str
    bytes: int
    width: int
    height: int
    transparent: bool
    frames: int


def is_picture(path: Place | PurePath) -> bool:
    """Whether the file's name says that it is a picture."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def inspect(path: Place) -> Facts:
    """Decode a file whole and say what it is.

    Raises:
        UserError: it cannot be read, is cut short, is no picture, or is too small or too large.
    """
    content = read(path)
    return facts(content, hashlib.sha256(content).hexdigest(), path)


def facts(content: bytes, sha256: str, path: Place) -> Facts:
    """Decode the bytes of a file whole and say what they are.

    Args:
        sha256: of ``content``.
        path: of the file, for messages.

    Raises:
        UserError: as ``inspect``.
    """
    image = _opened(content, path)
    width, height = image.size
    upright = _loaded(image, content, path, SHRINKS[0])  # all of its data is read, however small it comes out
    if image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):  # lies on its side
        width, height = height, width
    return Facts(
        sha256=sha256,
        bytes=len(content),
        width=width,
        height=height,
        transparent=upright.has_transparency_data and upright.mode not in DEEP,
        frames=_frames(content),
    )


def _frames(content: bytes) -> int:
    try:
        return getattr(Image.open(io.BytesIO(content)), "n_frames", 1)
    except Exception:  # an animation that is broken after its first frame, the only one that is used
        return 1


def read(path: Place) -> bytes:
    """All bytes of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def decode(content: bytes, path: Place, shrink: int = 1) -> Image.Image:
    """The first frame of a picture, upright, in the file's own colours.

    Args:
        content: the bytes of the file.
        path: of the file, for messages.
        shrink: one of ``SHRINKS`` if a picture of that part of the size will do. A JPEG is decoded to it at once (its
            blocks of 8 x 8 to smaller ones), which is quicker; others keep their size.

    Raises:
        UserError: as ``inspect``.
    """
    return _loaded(_opened(content, path), content, path, shrink)


def _opened(content: bytes, path: Place) -> Image.Image:
    """A picture of which no more than the header has been read."""
    with _quiet():
        try:
            image = Image.open(io.BytesIO(content))
        except UnidentifiedImageError:
            raise UserError(f"{path}: is not a picture; it begins with {content[:16]!r}") from None
        except Image.DecompressionBombError:
            most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
            raise UserError(f"{path}: is too large; expected at most {most} million pixels") from None
        except Exception as error:  # decoders raise whatever a broken file makes them raise
            raise UserError(f"{path}: is not a readable picture: {error}") from None
    _check_size(image, path)
    return image


def _loaded(image: Image.Image, content: bytes, path: Place, shrink: int) -> Image.Image:
    with _quiet():
        try:
            if shrink > 1:
                image.draft(None, (max(1, image.width // shrink), max(1, image.height // shrink)))
            image.load()
            upright = ImageOps.exif_transpose(image)
        except Exception as error:
            raise UserError(f"{path}: is broken or cut short ({len(content)} bytes): {error}") from None
    if upright.mode not in MODES:
        raise UserError(f"{path}: has colours of kind {upright.mode!r}; expected RGB, grey, palette or CMYK")
    return upright


class _Muffler:
    """Warnings off while any thread is inside; Python's own switch is one for all threads and must not be crossed."""

    def __init__(self) -> None:
        self.lock, self.inside, self.switch = Lock(), 0, ExitStack()

    def enter(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.switch.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.switch.close()


_muffler = _Muffler()


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow's warnings are either our errors or nobody's concern."""
    _muffler.enter()
    try:
        yield
    finally:
        _muffler.leave()


def _check_size(image: Image.Image, path: Place) -> None:
    width, height = image.size
    if min(width, height) < SMALLEST_SIDE:
        raise UserError(f"{path}: is {width} x {height} pixels; expected at least {SMALLEST_SIDE} on each side")


def rgb(image: Image.Image) -> Image.Image:
    """Any picture as 8 bit sRGB: 16 bit scaled, palettes and CMYK resolved, transparency laid over white."""
    image = _eight_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return _standard_colours(image) if image.mode in {"RGB", "CMYK"} else image.convert("RGB")


def alpha(image: Image.Image) -> Image.Image:
    """How opaque each pixel is, 8 bit; all of it where the picture has no transparency."""
    return image.convert("RGBA").getchannel("A")


def grey(image: Image.Image) -> Image.Image:
    """Any picture as 8 bit grey, for masks."""
    return rgb(image).convert("L")


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode not in DEEP:
        return image
    values = np.asarray(image).astype(np.float64).clip(0, 65535) / 257  # 65535 / 257 = 255
    return Image.fromarray(values.round().astype(np.uint8))


def _standard_colours(image: Image.Image) -> Image.Image:
    """``image`` (RGB or CMYK) converted from the colour profile in its file, where there is a usable one."""
    profile = image.info.get("icc_profile")
    if profile:
        try:
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(own):
                converted = ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
                return converted if converted is not None else image.convert("RGB")
        except (ImageCms.PyCMSError, OSError):
            pass  # a broken profile says nothing about colours: take the numbers as they are
    return image.convert("RGB")
