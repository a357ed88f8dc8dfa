"""What a recipe says of the place that pictures are cut at."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from finetune.config.section import Section


class CropConfig(Section):
    """Which part of a picture is used where it is longer or higher than its square or bucket."""

    position: Literal["center", "random"] = "center"
    """`random`: every draw takes one of the picture's `variants`, which lie at different places."""
    variants: PositiveInt = 4
    """Of `random`. Each is encoded and cached once, and once more mirrored with `flip`."""
