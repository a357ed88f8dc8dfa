"""Schedulers of diffusers with the settings that training has changed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import DDIMScheduler

UNBOUNDED = {"clip_sample": False, "thresholding": False}
"""Latents are not bounded by 1; a class whose default is to clip would ruin them."""


def with_settings(scheduler: Any, settings: Mapping[str, Any]) -> Any:
    """``scheduler`` with ``settings`` in place of its own; of class DDIM where its class does not know them all.

    ``from_config`` drops settings that stood at the old class's default, and the new class may have another, so all of
    them are passed by name.
    """
    if not settings:
        return scheduler
    own = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    if settings.keys() <= inspect.signature(type(scheduler)).parameters.keys():
        return type(scheduler).from_config({**own, **settings})
    return DDIMScheduler.from_config({**own, **UNBOUNDED, **settings})
