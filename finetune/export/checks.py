"""Questions put to a file, and their answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from finetune.errors import GuardError

T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """One question put to a file, and its answer."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Verification:
    """What was asked of a file or model folder."""

    path: Path
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def require(self) -> Verification:
        """Itself, where it passed.

        Raises:
            GuardError: naming the first check that failed.
        """
        for check in self.checks:
            if not check.passed:
                raise GuardError(f"{self.path}: {check.name}: {check.detail}")
        return self

    def __str__(self) -> str:
        lines = [f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.detail}" for check in self.checks]
        return "\n".join((str(self.path), *lines))


class Report:
    """Collects checks; one that raises has failed."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    @property
    def passed(self) -> bool:
        """Whether every check so far passed."""
        return all(check.passed for check in self.checks)

    def run(self, name: str, question: Callable[[], T], detail: Callable[[T], str] = str) -> T | None:
        """Ask; note the answer, in words, or what was raised."""
        try:
            answer = question()
        except Exception as error:  # a foreign loader may raise anything, and that is the answer
            self.checks.append(Check(name, False, str(error) or type(error).__name__))
            return None
        self.checks.append(Check(name, True, detail(answer)))
        return answer


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, diffusers warns of nothing and shows no progress."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
