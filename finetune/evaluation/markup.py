"""HTML that is escaped unless it was built here, and pictures that live inside the page."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

SMALL = 160  # pixels up to which a picture is kept as it is and shown with hard pixels
LARGEST = 384  # pixels to which larger ones are scaled down
VOID = {"img", "path", "line"}


ASSETS = Path(__file__).parent


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, *children: str | None, **attributes: str | int | float | None) -> Markup:
    """``<name attributes>children</name>``; children and values are escaped, None is left out.

    ``class_`` and ``for_`` stand for the attributes of these names, ``data_x`` for ``data-x``, "" for a bare one.
    """
    opening = name
    for key, value in attributes.items():
        if value is None:
            continue
        attribute = key.rstrip("_").replace("_", "-")
        opening += f" {attribute}" if value == "" else f' {attribute}="{_attribute(str(value))}"'
    if name in VOID:
        return Markup(f"<{opening}/>")
    return Markup(f"<{opening}>{join(children)}</{name}>")


def join(children: tuple[str | None, ...] | list[str | None] | list[Markup]) -> Markup:
    """Children one after the other, each escaped unless it is ``Markup``."""
    return Markup("".join(escape(child) for child in children if child is not None))


def escape(text: str) -> Markup:
    """``text`` as HTML; ``Markup`` as it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(_without_paths(text)))


def picture(image: Image.Image, alt: str, kind: str = "") -> Markup:
    """An ``<img>`` that carries its pixels: PNG as it is where it is small, else a JPEG scaled down."""
    crisp = max(image.size) <= SMALL
    source = _png(image) if crisp else _jpeg(image)
    classes = " ".join(part for part in ("crisp" if crisp else "", kind) if part)
    return tag("img", src=source, alt=alt, title=alt, class_=classes or None, loading="lazy", tabindex="0")


def document(title: str, header: str, sections: str, nav: str = "") -> str:
    """A page in the toolkit's dress that needs nothing else and asks no server for anything.

    Args:
        title: text. header, sections, nav: HTML.
    """
    template = Template((ASSETS / "report.html").read_text(encoding="utf-8"))
    style = (ASSETS / "report.css").read_text(encoding="utf-8")
    return template.substitute(style=style, title=escape(title), header=header, nav=nav, sections=sections)


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _jpeg(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=87)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _without_paths(text: str) -> str:
    """A page is passed on: it says nothing of where on the machine it was made."""
    for folder, stand_in in ((Path.cwd(), "."), (Path.home(), "~")):
        if len(folder.parts) > 1:
            text = text.replace(f"{folder}/", f"{stand_in}/").replace("././", "./")
    return text


def _attribute(value: str) -> str:
    return value if value.startswith("data:image/") and '"' not in value else html.escape(_without_paths(value))
