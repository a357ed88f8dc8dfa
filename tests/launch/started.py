"""Launchers that run while a test watches them, and are gone when it is over."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
LAUNCHER = [sys.executable, "-m", "finetune.launch"]
PATIENCE = 240.0  # seconds: none of these tests waits that long unless something is broken


class Started:
    """A command in a session of its own; what it says goes to a file."""

    def __init__(
        self, command: Sequence[str | Path], said: Path, cwd: Path | None = None, /, **environment: str
    ) -> None:
        self._said = said
        with said.open("a") as file:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=surroundings(**environment),
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self._said.read_text()

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds, as long as the command runs."""
        end = time.monotonic() + PATIENCE
        while not holds():
            assert self.process.poll() is None and time.monotonic() < end, self.said
            time.sleep(0.05)

    def code(self) -> int:
        """The exit code, once there is one."""
        return self.process.wait(PATIENCE)

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes that were launched."""
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # those that have just gone
                surroundings = child.environ()
                if "LOCAL_RANK" in surroundings:
                    found[int(surroundings["RANK"])] = child
        return found

    def kill(self, rank: int) -> None:
        """End one of the processes, as the system does when memory is short."""
        self.ranks()[rank].kill()

    def end(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            for process in [*parent.children(recursive=True), parent]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def started(
    command: Sequence[str | Path], said: Path, cwd: Path | None = None, /, **environment: str
) -> Iterator[Started]:
    running = Started(command, said, cwd, **environment)
    try:
        yield running
    finally:
        running.end()


def surroundings(**more: str) -> Mapping[str, str]:
    """As a person has them: launchers then share the cores out."""
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return {**kept, "PYTHONPATH": f"{ROOT}{os.pathsep}{kept.get('PYTHONPATH', '')}", **more}


def steps(output: Path) -> int:
    """How many a run has written down."""
    path = output / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def listening(port: int) -> bool:
    with socket.socket() as held:
        return held.connect_ex(("127.0.0.1", port)) == 0
