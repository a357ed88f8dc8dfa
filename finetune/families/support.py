"""Which methods have a place in which families, as the families' own classes say it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune.families import families
from finetune.family import Unsupported, without_hypernetworks

EVERYWHERE = ("lora", "lokr", "loha", "oft", "full", "embedding", "pivotal")
"""What needs no more than layers and words, which every family has."""


def support(family: Any) -> dict[str, str | None]:
    """Method -> None where it works in a family, or the reason why it does not."""
    return {
        **dict.fromkeys(EVERYWHERE),
        "custom diffusion": _reason(family.readers),
        "hypernetwork": without_hypernetworks(family.readers, family.parts["denoiser"].subfolder),
        "aesthetic": _reason(family.space),
    }


def table() -> str:
    """Families and methods as a Markdown table, and the reasons for what there is not."""
    methods = list(support(next(iter(families().values()))))
    rows = [["family", "models", *methods], ["---"] * (len(methods) + 2)]
    reasons: dict[str, None] = {}
    for name, family in families().items():
        found = support(family)
        rows.append([f"`{name}`", family.models, *("no" if found[method] else "yes" for method in methods)])
        reasons |= dict.fromkeys(f"- `{name}`: {', '.join(said)}: {why}" for why, said in _by_reason(found))
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", *reasons]) + "\n"


def _by_reason(found: dict[str, str | None]) -> Iterator[tuple[str, list[str]]]:
    for why in dict.fromkeys(reason for reason in found.values() if reason):
        yield why, [method for method, reason in found.items() if reason == why]


def _reason(found: object) -> str | None:
    return found.reason if isinstance(found, Unsupported) else None
