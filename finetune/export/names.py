"""Module paths as one word, as kohya's files write them, and back."""

from __future__ import annotations

import re

# words of module paths that contain an underscore themselves, longest first where one begins another
_WORDS = (
    "transformer_blocks",
    "down_blocks",
    "mid_block",
    "up_blocks",
    "time_emb_proj",
    "time_embedding",
    "conv_shortcut",
    "conv_in",
    "conv_out",
    "linear_1",
    "linear_2",
    "proj_in",
    "proj_out",
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "text_model",
    "self_attn",
    "q_proj",
    "k_proj",
    "v_proj",
    "out_proj",
)
_PARTS = re.compile("|".join((*(rf"{word}(?=_|$)" for word in _WORDS), r"[^_]+")))


def joined(path: str) -> str:
    """A module path as one word: every dot becomes an underscore.

    Raises:
        ValueError: the path could not be read back from it.
    """
    word = path.replace(".", "_")
    if parted(word) != path:
        raise ValueError(f"module {path} has no underscored name that can be read back")
    return word


def parted(word: str) -> str:
    """The module path that ``joined`` made ``word`` of."""
    return ".".join(_PARTS.findall(word))
