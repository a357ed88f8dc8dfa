"""``tinyworld:subject/N`` and ``tinyworld:style/N`` as folders of pictures, drawn when they are asked for."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from finetune import files
from finetune.config.origin import EMBEDDED
from finetune.config.schema import ConceptConfig
from finetune.errors import UserError
from finetune.randomness import derive
from finetune.tinyworld.commands import write_style, write_subject
from finetune.tinyworld.style import Style, style
from finetune.tinyworld.subject import subject

OWN_MASKS = "tinyworld"


def resolve(config: ConceptConfig, cache: Path) -> ConceptConfig:
    """``config`` with a real folder, and with the prompts, trigger and masks of a subject where it leaves them open.

    Args:
        config: its folder is ``tinyworld:subject/N`` or ``tinyworld:style/N``; ``masks: tinyworld`` asks for a
            subject's own masks. Its ``trigger`` stands in all captions in place of the set's own rare word.
        cache: the pictures are written below it.

    Raises:
        UserError: the folder names nothing of the embedded world.
    """
    found = re.fullmatch(rf"{EMBEDDED}(subject|style)/(\d+)", config.folder or "")
    if not found:
        raise UserError(
            f"folder {config.folder!r}: no such thing in the embedded world; "
            "expected tinyworld:subject/N or tinyworld:style/N, N from 0"
        )
    kind, seed = found[1], int(found[2])
    one = subject(seed) if kind == "subject" else style(seed)
    name = f"{kind}-{seed}"
    if config.trigger and config.trigger != one.token:
        one = replace(one, token=config.trigger)
        name += f"-{derive(0, config.trigger):016x}"
    folder = cache / "tinyworld" / name
    write = write_subject if kind == "subject" else write_style
    _publish(partial(write, seed, token=one.token), folder)
    own = {"folder": str(folder / "instance"), "masks": config.masks}
    if isinstance(one, Style):
        return config.model_copy(update={**own, "trigger": config.trigger or one.token})
    return config.model_copy(
        update={
            **own,
            "masks": str(folder / "masks") if config.masks == OWN_MASKS else config.masks,
            "prompt": config.prompt or one.instance_prompt,
            "class_prompt": config.class_prompt or one.class_prompt,
            "trigger": config.trigger or one.token,
        }
    )


def _publish(write: Callable[[Path], object], folder: Path) -> None:
    """Write what ``write`` draws where they are not there as they should be.

    Drawing takes milliseconds, so it is done every time: what is left of an older version of the world never stays,
    and several processes can do it at once.
    """
    with tempfile.TemporaryDirectory() as drawn:
        write(Path(drawn))
        for source in sorted(Path(drawn).rglob("*")):
            target = folder / source.relative_to(drawn)
            if source.is_file() and not (target.is_file() and target.read_bytes() == source.read_bytes()):
                with files.replacing(target) as temporary:
                    temporary.write_bytes(source.read_bytes())
