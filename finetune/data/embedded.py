"""``tinyworld:subject/N`` as a folder of pictures: the embedded world's subjects, drawn when they are asked for."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from finetune import files
from finetune.config.schema import ConceptConfig
from finetune.errors import UserError
from finetune.tinyworld.commands import write_subject
from finetune.tinyworld.subject import subject

SCHEME = "tinyworld:"
OWN_MASKS = "tinyworld"


def resolve(config: ConceptConfig, cache: Path) -> ConceptConfig:
    """``config`` with a real folder, and with the subject's prompts, trigger and masks where it leaves them open.

    Args:
        config: its folder is ``tinyworld:subject/N``; ``masks: tinyworld`` asks for the world's own masks.
        cache: the pictures are written below it.

    Raises:
        UserError: the folder names nothing of the embedded world.
    """
    found = re.fullmatch(rf"{SCHEME}subject/(\d+)", config.folder)
    if not found:
        raise UserError(
            f"folder {config.folder!r}: no such thing in the embedded world; expected tinyworld:subject/N, N from 0"
        )
    one = subject(int(found[1]))
    folder = cache / "tinyworld" / f"subject-{one.seed}"
    _publish(one.seed, folder)
    return config.model_copy(
        update={
            "folder": str(folder / "instance"),
            "masks": str(folder / "masks") if config.masks == OWN_MASKS else config.masks,
            "prompt": config.prompt or one.instance_prompt,
            "class_prompt": config.class_prompt or one.class_prompt,
            "trigger": config.trigger or one.token,
        }
    )


def _publish(seed: int, folder: Path) -> None:
    """Write a subject's files where they are not there as they should be.

    Drawing takes milliseconds, so it is done every time: what is left of an older version of the world never stays,
    and several processes can do it at once.
    """
    with tempfile.TemporaryDirectory() as drawn:
        write_subject(seed, Path(drawn))
        for source in sorted(Path(drawn).rglob("*")):
            target = folder / source.relative_to(drawn)
            if source.is_file() and not (target.is_file() and target.read_bytes() == source.read_bytes()):
                with files.replacing(target) as temporary:
                    temporary.write_bytes(source.read_bytes())
