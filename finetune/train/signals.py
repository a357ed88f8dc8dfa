"""A wish to stop that waits for the end of the step."""

from __future__ import annotations

import signal
import threading
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Signals:
    """Inside, SIGTERM, SIGINT and SIGUSR1 are noted and nothing more; the loop looks at ``name`` between steps.

    Hence a second signal cannot break what the first one began. Afterwards the handlers of before are back. Outside
    the main thread, where Python lets nobody handle signals, nothing happens.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
