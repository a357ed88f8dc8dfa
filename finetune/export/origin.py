"""Where an adapter file comes from and what calls it, as its header says; every trainer has fields of its own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.export.keys import Key
from finetune.export.metadata import OWN


def made_by(metadata: Mapping[str, str], keys: Sequence[Key]) -> str | None:
    """The tool, where the header or the keys tell."""
    if f"{OWN}version" in metadata:
        return f"finetune {metadata[f'{OWN}version']}"
    if any(key.startswith("ot_") for key in metadata):
        return "OneTrainer"
    if "ai-toolkit" in metadata.get("software", ""):
        return "ai-toolkit"
    module = metadata.get("ss_network_module", "")
    if module:
        return "LyCORIS in kohya's tools" if module.startswith("lycoris") else f"kohya's tools ({module})"
    if any(key.network == "lycoris" for key in keys):
        return "LyCORIS, as SimpleTuner uses it"
    return "diffusers or PEFT" if "lora_adapter_metadata" in metadata else None


def base(metadata: Mapping[str, str]) -> str | None:
    """What the header says it was trained on, the most exact first."""
    known = (f"{OWN}base", "ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
    said = (metadata.get(key) for key in known)
    return next((one for one in said if one and one != "None"), None)


def triggers(path: Path, metadata: Mapping[str, str]) -> list[str]:
    """Words that call what was learned: from the header and the card that A1111 has beside the file, else the most
    frequent tags.
    """
    found = [metadata.get("modelspec.trigger_phrase", "")]
    card = path.with_suffix(".json")
    if path.is_file() and card.is_file():
        said = mapping(card.read_text(encoding="utf-8")).get("activation text")
        found.append(said if isinstance(said, str) else "")
    counted: Counter[str] = Counter()
    for tags in mapping(metadata.get("ss_tag_frequency", "")).values():
        if isinstance(tags, dict):
            counted.update({tag.strip(): count for tag, count in tags.items() if isinstance(count, int)})
    if not any(found):
        found += [tag for tag, _ in counted.most_common(3)]
    return list(dict.fromkeys(word for word in found if word))


def mapping(text: str) -> dict[str, Any]:
    """A mapping in JSON; empty for anything else."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
