"""No process waits for ever: each says every second that it lives and what it does, and watches the others.

A launcher ends the processes of its machine when one of them dies. Nobody would notice one that is stopped, or a
machine that is gone: the others sit in a collective until its timeout, which has to be longer than the longest honest
work of one process alone, hours of class images. So here collectives have no timeout (``FOREVER``), and a run ends so:

- A process that is silent for ``silence`` seconds is taken for dead, and all others end.
- One that fails tells the others its traceback before it goes; they say it and end.
- Processes that wait for one another, which no time would mend, end.
- One that lives and does not come is waited for. The main process says so every minute: who waits, for whom, and what
  that one does.

Processes tell each other by the store over which they have found each other. Its calls may stand still where its
machine is gone, so one thread talks and another judges what has been heard. Time is counted in looks, not by the clock:
a run that was suspended as a whole goes on.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import NoReturn

import psutil
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed import distributed_c10d as c10d

from finetune.errors import Stopped

FOREVER = datetime.timedelta(days=365)
"""The timeout of collectives."""

SILENCE = 25.0  # seconds; FINETUNE_SILENCE overrides it
BEAT = 0.5  # seconds between two looks
TELL = 60.0  # seconds between two lines about who waits
GRACE = 4.0  # seconds in which a process may end by itself when another has failed


@dataclass(frozen=True)
class State:
    """What a process tells of itself.

    Attributes:
        beats: grows as long as it lives.
        calls: how often it has waited for the others.
        where: what it waits for at this moment, or "".
        doing: what it works on.
        left: it needs nobody any more.
        failure: the traceback of what ended it, or "".
        parent, pid: its launcher and itself, on its own machine.
    """

    beats: int = 0
    calls: int = 0
    where: str = ""
    doing: str = "starting"
    left: bool = False
    failure: str = ""
    parent: int = 0
    pid: int = 0

    @property
    def news(self) -> tuple[int, str, str]:
        """What changes when it comes along."""
        return self.calls, self.where, self.doing


class Watch:
    """What one process knows of all.

    Args:
        store: a connection of its own to what all processes share.
        silence: seconds after which a process that says nothing is taken for dead.
    """

    def __init__(self, rank: int, world: int, store: c10d.Store, silence: float = SILENCE) -> None:
        self._rank, self._names, self._store = rank, [f"{number}" for number in range(world)], store
        self._silence, self._inside, self._beats, self._lost = silence, 0, 0, ""
        self._mine = State(parent=os.getppid(), pid=os.getpid())
        self._heard: list[State] = []
        self._telling = threading.Lock()
        self._over = threading.Event()
        self._tell()
        for task in (self._talk, self._judge):
            threading.Thread(target=task, name=f"waiting:{task.__name__}", daemon=True).start()

    def doing(self, text: str) -> None:
        """Say what this process works on, as the others read it while they wait."""
        self._mine = replace(self._mine, doing=text)

    @contextlib.contextmanager
    def waiting(self, where: str) -> Iterator[None]:
        """Around a call that returns when all processes have made it."""
        if self._inside == 0:
            self._mine = replace(self._mine, calls=self._mine.calls + 1, where=where)
        self._inside += 1
        try:
            yield
        except RuntimeError:  # that another one is gone; whose fault it is will be heard in a moment
            self._over.wait(2 * GRACE)
            raise
        finally:
            self._inside -= 1
            if self._inside == 0:
                self._mine = replace(self._mine, where="")

    def leave(self, failure: BaseException | None) -> None:
        """Tell the others that this process ends, and why where it fails."""
        failed = failure is not None and not isinstance(failure, Stopped)
        told = "".join(traceback.format_exception(failure)) if failed else ""
        self._mine = replace(self._mine, left=True, failure=told)
        self._over.set()
        with contextlib.suppress(RuntimeError):
            self._tell()

    def _tell(self) -> None:
        with self._telling:
            self._beats += 1
            self._store.set(self._names[self._rank], json.dumps(asdict(replace(self._mine, beats=self._beats))))

    def _talk(self) -> None:
        try:
            while not self._over.wait(BEAT):
                self._tell()
                self._heard = [State(**json.loads(told)) for told in self._store.multi_get(self._names)]
        except RuntimeError as error:  # whoever held the store is gone
            self._lost = f"{error}".splitlines()[0]

    def _judge(self) -> None:
        last: list[State] = [State()] * len(self._names)
        quiet, same = ([0.0] * len(last) for _ in range(2))  # seconds without a beat, and without a change
        told, failing = 0.0, 0.0
        while not self._over.wait(BEAT):
            now = self._heard or last
            for rank, (before, after) in enumerate(zip(last, now, strict=True)):
                quiet[rank] = 0.0 if before.beats != after.beats or after.left else quiet[rank] + BEAT
                same[rank] = 0.0 if before.news != after.news else same[rank] + BEAT
            last = now
            if self._lost and now[0].left:  # the main process held the store, and has finished
                return
            failing = failing + BEAT if self._lost or any(state.failure for state in now) else 0.0
            if failing >= GRACE:
                self._end(_failures(now) or f"the launcher or the main process has gone ({self._lost})")
            if quiet[self._rank] >= self._silence:
                self._end("the machine of the main process does not answer, or not all processes have come")
            if silent := [rank for rank in range(len(now)) if quiet[rank] >= self._silence]:
                self._end("\n".join(self._bury(rank, now[rank]) for rank in silent))
            if min(same) >= self._silence and crossed(now):
                self._end(f"processes wait for one another: {_wheres(now)}")
            told += BEAT
            if self._rank == 0 and told >= TELL and (line := who_waits(now, same)):
                print(line, file=sys.stderr, flush=True)
                told = 0.0

    def _bury(self, rank: int, state: State) -> str:
        """Say what is known of a silent process, and end it where this one is of the same launcher, which would give it
        half a minute more.
        """
        found = "its machine or its process is gone"
        with contextlib.suppress(psutil.Error, OSError):
            if state.parent == os.getppid() and (process := psutil.Process(state.pid)).ppid() == state.parent:
                found = f"its process {state.pid} is {process.status()}"
                os.kill(state.pid, signal.SIGKILL)
        at = state.where or state.doing
        return f"process {rank} has said nothing for {self._silence:.0f} s, last at: {at}; {found}"

    def _end(self, why: str) -> NoReturn:
        print(f"rank {self._rank} ends: {why}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread may sit in a call that nothing interrupts


def crossed(states: Sequence[State]) -> bool:
    """Whether every process waits or has left, and not all for the same."""
    waiting = [state for state in states if state.where]
    if not waiting or any(not state.where and not state.left for state in states):
        return False
    missed = any(state.left and state.calls < max(one.calls for one in waiting) for state in states)
    return missed or len({(state.calls, state.where) for state in waiting}) > 1


def who_waits(states: Sequence[State], same: Sequence[float]) -> str:
    """A line about those that have waited for ``TELL`` seconds, or "".

    Args:
        same: seconds for which each has told the same.
    """
    waiting = [rank for rank, state in enumerate(states) if state.where and same[rank] >= TELL]
    if not waiting:
        return ""
    first = waiting[0]
    names = ", ".join(f"{rank}" for rank in waiting[:5]) + (" and others" if len(waiting) > 5 else "")
    busy = [
        f"process {rank} ({state.doing})" for rank, state in enumerate(states) if not state.where and not state.left
    ]
    others = ", ".join(busy[:5]) or "one another"
    return f"rank {names} waited {same[first]:.0f} s ({states[first].where}) for {others}"


def wait_for_ever() -> None:
    """Take the timeouts from all groups of processes that there are."""
    c10d._get_default_store().set_timeout(FOREVER)
    for group in c10d._world.pg_map:
        c10d._set_pg_timeout(FOREVER, group)


@cache  # one of each process, however many runs it has
def join(rank: int, world: int) -> Watch:
    """Watch the others of a run whose processes have found each other by MASTER_ADDR and MASTER_PORT."""
    silence = float(os.environ.get("FINETUNE_SILENCE", SILENCE))
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = datetime.timedelta(seconds=silence)
    plain = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=patience)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Watch(rank, world, c10d.PrefixStore(f"finetune/{attempt}", plain), silence)


def _failures(states: Sequence[State]) -> str:
    return "\n".join(f"process {rank} has failed:\n{one.failure}" for rank, one in enumerate(states) if one.failure)


def _wheres(states: Sequence[State]) -> str:
    return ", ".join(f"process {rank}: {state.where or 'has ended'}" for rank, state in enumerate(states))
