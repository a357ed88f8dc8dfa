"""New words of several tokens in pipelines that know of none."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def write_out(pipeline: Any, expand: Callable[[str], str]) -> None:
    """Let ``pipeline`` read each of its prompts, those that guide away too, as ``expand`` writes it.

    For pipelines without ``maybe_convert_prompt``, which diffusers' others have for it.
    """
    plain = pipeline.encode_prompt

    @functools.wraps(plain)
    def encode_prompt(*arguments: Any, **named: Any) -> Any:
        asked = inspect.signature(plain).bind(*arguments, **named)
        for name, value in asked.arguments.items():
            if name.removeprefix("negative_").startswith("prompt") and isinstance(value, str | list):
                asked.arguments[name] = expand(value) if isinstance(value, str) else list(map(expand, value))
        return plain(*asked.args, **asked.kwargs)

    pipeline.encode_prompt = encode_prompt
