"""Where text and pictures of a family can be compared."""

from __future__ import annotations

from collections.abc import Callable

from finetune.errors import UserError
from finetune.family import ModelFamily, SharedSpace, Unsupported


def shared_space(family: ModelFamily, clip: str | None) -> SharedSpace:
    """The space that the family's text encoder shares with pictures.

    Args:
        clip: as in ``Sites.shared_space``.

    Raises:
        UserError: the family has none, or ``clip`` is not its text encoder's.
    """
    return require_space(family)(clip)


def require_space(family: ModelFamily) -> Callable[[str | None], SharedSpace]:
    """What finds the family's shared space. Loads nothing yet.

    Raises:
        UserError: the family has none.
    """
    find = family.sites.shared_space
    if isinstance(find, Unsupported):
        raise UserError(f"adapter.kind: no aesthetic embedding can be made for the family {family.name}: {find.reason}")
    return find
