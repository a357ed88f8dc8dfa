"""No process waits for ever: each says every second that it lives and what it does, and hears whether the run goes on.

A launcher ends the processes of its machine when one of them dies. Nobody would notice one that is stopped, or a
machine that is gone: the others sit in a collective until its timeout, which has to be longer than the longest honest
work of one process alone, hours of class images. So here collectives have no timeout (``FOREVER``), and a run ends so:

- One that fails leaves its traceback for all before it goes; they say it and end.
- One that is gone, or stopped (SIGSTOP) for ``PATIENCE`` seconds, is seen by those of the same launcher.
- One that is silent for ``SILENCE`` seconds is taken for dead. That is its machine, or a process alone on one, so this
  is long: native code may keep the interpreter, and with it the thread that speaks, for minutes.
- Processes that wait for one another, which no time would mend, end.
- One that lives and does not come is waited for. The main process says so every minute: who waits, for whom, and what
  that one does.

Processes tell each other by the store over which they have found each other: each writes a line, and reads that of
the main process, which reads all, those of its launcher, and whether all are to end. Calls of the store may stand still
where its machine is gone, so one thread talks and another judges what has been heard. Time is counted in looks, not by
the clock: a run that was suspended as a whole goes on.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import NoReturn

import psutil
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed import distributed_c10d as c10d

from finetune.errors import Stopped, UserError

FOREVER = datetime.timedelta(days=365)
"""The timeout of collectives."""

SILENCE = 300.0  # seconds; FINETUNE_SILENCE overrides it
PATIENCE = 15.0  # seconds for which what is plainly wrong must last; no more than the silence
BEAT = 1.0  # seconds between two looks
TELL = 60.0  # seconds between two lines about who waits
GRACE = 4.0  # seconds in which a process may end by itself when the run is over
END = "end"


@dataclass(frozen=True)
class State:
    """What a process tells of itself.

    Attributes:
        beats: grows as long as it lives.
        calls: how often it has waited for the others.
        where: what it waits for at this moment, or "".
        doing: what it works on.
        left: it needs nobody any more.
        parent, pid: its launcher and itself, on its own machine.
    """

    beats: int = 0
    calls: int = 0
    where: str = ""
    doing: str = "starting"
    left: bool = False
    parent: int = 0
    pid: int = 0

    @property
    def news(self) -> tuple[int, str, str]:
        """What changes when it comes along."""
        return self.calls, self.where, self.doing


class Watch:
    """What one process knows of the others.

    Args:
        store: a connection of its own to what all processes share.
        silence: seconds after which a process that says nothing is taken for dead.
        local: the ranks of its launcher.
    """

    def __init__(
        self, rank: int, world: int, store: c10d.Store, silence: float = SILENCE, local: Sequence[int] = ()
    ) -> None:
        self._rank, self._names, self._store = rank, [f"{number}" for number in range(world)], store
        self._silence, self._patience, self._inside, self._beats = silence, min(PATIENCE, silence), 0, 0
        self._mine = State(parent=os.getppid(), pid=os.getpid())
        self._local = local
        self._read = range(world) if rank == 0 else sorted({0, *local})
        self._siblings: list[tuple[int, psutil.Process]] = []
        self._heard: list[State] = [State()] * world  # by all but the main process, of few
        self._why = ""  # what ends the run
        self._telling = threading.Lock()
        self._over = threading.Event()
        self._store.compare_set(END, "", "")
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
        self._mine = replace(self._mine, left=True)
        self._over.set()
        failed = failure is not None and not isinstance(failure, Stopped)
        why = "".join(traceback.format_exception(failure)) if failed else ""
        farewell = threading.Thread(target=self._say_farewell, args=(why,), daemon=True)
        farewell.start()
        farewell.join(GRACE)  # the store's machine may be gone
        if failed and self._rank == 0:
            time.sleep(2 * BEAT)  # the store may go with this process

    def _say_farewell(self, why: str) -> None:
        with contextlib.suppress(RuntimeError):
            if why:
                self._store.compare_set(END, "", f"process {self._rank} has failed:\n{why}")
            self._tell()

    def _tell(self) -> None:
        with self._telling:
            self._beats += 1
            self._store.set(self._names[self._rank], json.dumps(asdict(replace(self._mine, beats=self._beats))))

    def _talk(self) -> None:
        names, come = [f"{one}" for one in self._read], False
        try:
            while not self._over.wait(BEAT):
                self._tell()
                if self._why:
                    self._store.compare_set(END, "", self._why)
                self._why = self._why or self._store.get(END).decode()
                if come := come or self._store.check(names):
                    for one, told in zip(self._read, self._store.multi_get(names), strict=True):
                        self._heard[one] = State(**json.loads(told))
                    self._siblings = self._siblings or self._find()
        except RuntimeError as error:  # whoever held the store is gone
            if not self._heard[0].left:
                self._why = self._why or f"the launcher or the main process has gone ({error})".splitlines()[0]

    def _find(self) -> list[tuple[int, psutil.Process]]:
        """The other processes of this launcher; none of another's that has such a number."""
        found = []
        for rank in self._local:
            state = self._heard[rank]
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(state.pid)
                if rank != self._rank and state.parent == self._mine.parent == process.ppid():
                    found.append((rank, process))
        return found

    def _judge(self) -> None:
        last = list(self._heard)
        quiet, same = ([0.0] * len(last) for _ in range(2))  # seconds without a beat, and without a change
        wrong: dict[int, float] = {}
        told, ending = 0.0, 0.0
        while not self._over.wait(BEAT):
            now = list(self._heard)
            for rank, (before, after) in enumerate(zip(last, now, strict=True)):
                quiet[rank] = 0.0 if before.beats != after.beats or after.left else quiet[rank] + BEAT
                same[rank] = 0.0 if before.news != after.news else same[rank] + BEAT
            last = now
            self._why = self._why or self._siblings_fault(wrong) or self._fault(now, quiet, same)
            ending = ending + BEAT if self._why else 0.0
            if ending >= GRACE:
                self._end(self._why)
            told += BEAT
            if self._rank == 0 and told >= TELL and (line := who_waits(now, same)):
                print(line, file=sys.stderr, flush=True)
                told = 0.0

    def _fault(self, states: Sequence[State], quiet: Sequence[float], same: Sequence[float]) -> str:
        """What is wrong with the run as this process has heard of it, or ""."""
        if quiet[0] >= self._silence:  # at the main process: what it says itself does not arrive either
            return f"the main process or its machine has said nothing for {self._silence:.0f} s"
        if self._rank:
            return ""
        if silent := [rank for rank, seconds in enumerate(quiet) if seconds >= self._silence]:
            who = "; ".join(f"process {rank}, which was at {self._at(rank)}" for rank in silent)
            return f"nothing has been heard for {self._silence:.0f} s of {who}"
        if min(same) >= self._patience and crossed(states):
            return f"processes wait for one another: {_wheres(states)}"
        return ""

    def _siblings_fault(self, wrong: dict[int, float]) -> str:
        """What is wrong with a process of this launcher, or "". A stopped one, which obeys no launcher, is killed.

        Args:
            wrong: seconds for which each has been stopped or gone; counted on here.
        """
        for rank, process in self._siblings:
            status = _status(process)
            wrong[rank] = 0.0 if status == "running" or self._heard[rank].left else wrong.get(rank, 0.0) + BEAT
            if status == "stopped" and wrong[rank] >= self._patience:
                with contextlib.suppress(psutil.Error):
                    process.kill()
                told = f"process {rank} (pid {process.pid}) was stopped for {wrong[rank]:.0f} s (SIGSTOP) and is killed"
                print(told, file=sys.stderr, flush=True)  # at once: the launcher may end this one too
                return told
            if status == "gone" and wrong[rank] > 2 * BEAT:  # not just leaving
                return f"process {rank} (pid {process.pid}) has gone without a word; it was at {self._at(rank)}"
        return ""

    def _at(self, rank: int) -> str:
        state = self._heard[rank]
        return f"{state.doing}, {state.where}" if state.where else state.doing

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
def join(rank: int, world: int, local: range) -> Watch:
    """Watch the others of a run whose processes have found each other by MASTER_ADDR and MASTER_PORT.

    Args:
        local: the ranks of this process's launcher.

    Raises:
        UserError: FINETUNE_SILENCE is no number of seconds.
    """
    silence = _silence(os.environ.get("FINETUNE_SILENCE", f"{SILENCE}"))
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = datetime.timedelta(seconds=silence)
    plain = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=patience)
    return Watch(rank, world, c10d.PrefixStore(f"finetune/{_attempt()}", plain), silence, local)


def _silence(said: str) -> float:
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    if not 2 * BEAT <= seconds < threading.TIMEOUT_MAX:
        raise UserError(f"FINETUNE_SILENCE is {said!r}: write the seconds that a process may be silent, such as 300")
    return seconds


def _attempt() -> str:
    """Sets a launcher's attempts apart where they share its store. A store of their own is another one each time, and
    launchers of several machines do not count alike: only that whose process has died counts an attempt.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if shared else "0"


def _status(process: psutil.Process) -> str:
    """One of "running", "stopped" and "gone"."""
    try:
        status = process.status() if process.is_running() else psutil.STATUS_DEAD
    except psutil.NoSuchProcess:
        return "gone"
    except psutil.Error:  # it may not be looked at
        return "running"
    gone = status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return "gone" if gone else "stopped" if status == psutil.STATUS_STOPPED else "running"


def _wheres(states: Sequence[State]) -> str:
    return ", ".join(f"process {rank}: {state.where or 'has ended'}" for rank, state in enumerate(states))
