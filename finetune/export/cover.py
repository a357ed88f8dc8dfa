"""The picture that tools show beside an adapter's name."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path

from PIL import Image

from finetune.files import header_bytes, replacing

SIDE = 256
THUMBNAIL = "modelspec.thumbnail"


def put_cover(path: Path, picture: Image.Image) -> None:
    """Put a picture into an adapter's header (ModelSpec), and beside a file with a card as A1111 and Forge look for it.

    Tensors stay as they are, bit for bit. Files that are no safetensors have no place for one.

    Args:
        path: of a safetensors file; a folder or an archive is left alone.
    """
    if path.suffix != ".safetensors":
        return
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    small.save(content, format="JPEG", quality=85)
    said = f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
    with path.open("rb") as old, replacing(path) as temporary:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        header["__metadata__"] = dict(sorted({**header.get("__metadata__", {}), THUMBNAIL: said}.items()))
        with temporary.open("wb") as new:
            new.write(header_bytes(header))
            shutil.copyfileobj(old, new)
    if path.with_suffix(".json").is_file():
        with replacing(path.with_suffix(".preview.png")) as temporary:
            picture.save(temporary, format="PNG")
