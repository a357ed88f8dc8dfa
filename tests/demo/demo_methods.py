"""The methods whose files the demo is tried with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WORDS = {"kind": "embedding", "tokens": [{"token": "<zib>", "initializer": "star", "vectors": 2}]}
LORA = {"kind": "lora", "rank": 2}
METHODS: Mapping[str, dict[str, Any]] = {
    "lora": {**LORA, "text_encoder": True},
    "dora": {**LORA, "use_dora": True},
    "lokr": {"kind": "lokr", "rank": 2},
    "loha": {"kind": "loha", "rank": 2},
    "oft": {"kind": "oft", "block_size": 4},
    "full": {"kind": "full"},
    "delta": {"kind": "full", "select": "cross-kv"},
    "embedding": WORDS,
    "pivotal": {"kind": "pivotal", "embedding": WORDS, "weights": LORA},
    "hypernetwork": {"kind": "hypernetwork"},
}
