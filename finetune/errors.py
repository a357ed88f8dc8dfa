"""The two ways in which a run is refused, and the nearest right thing to say."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something that a user wrote or pointed at is wrong. Commands print the message alone and exit with 2.

    The message says where (file, line or key), what was found, what was expected, and the nearest right thing.
    """


class GuardError(RuntimeError):
    """A run failed its own checks: a non-finite loss, an adapter that cannot be read back. Commands exit with 4."""


class Stopped(RuntimeError):
    """A signal ended the run after a valid checkpoint was written. Commands exit with 3; starting again resumes."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt ``word``: ``"; did you mean 'rank'?"``, or the choices where nothing is close."""
    choices = sorted(set(known))
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(choices)}" if choices else ""
