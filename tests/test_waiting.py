"""Processes that watch each other: here as threads of one, which tell each other by a store in memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import HashStore

from finetune import waiting
from finetune.errors import Stopped, UserError
from finetune.waiting import State, Watch, crossed, who_waits

Make = Callable[..., Watch]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have ended a process; its judge is gone then."""
    said: list[str] = []

    def end(watch: Watch, why: str) -> None:
        said.append(f"rank {watch._rank}: {why}")
        raise SystemExit

    monkeypatch.setattr(Watch, "_end", end)
    monkeypatch.setattr(waiting, "BEAT", 0.02)
    monkeypatch.setattr(waiting, "GRACE", 0.2)
    return said


@pytest.fixture
def watches(ends: list[str]) -> Iterator[Make]:
    """Makes as many as are asked for, which know each other."""
    made: list[Watch] = []

    def make(world: int, silence: float = 0.5, store: Any = None) -> list[Watch]:
        store = store or HashStore()
        store.set_timeout(timedelta(seconds=5))
        made.extend(Watch(rank, world, store, silence) for rank in range(world))
        return made

    yield make
    for watch in made:
        watch._over.set()
    for thread in threading.enumerate():
        if thread.name.startswith("waiting:"):
            thread.join(5)


def until(holds: Callable[[], Any], seconds: float = 10.0) -> None:
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, "it has not come"
        time.sleep(0.02)


def test_long_work_of_one_ends_nobody(watches: Make, ends: list[str]) -> None:
    """Three times the silence: the process works on, and says so."""
    one, _ = watches(2)
    with one.waiting("barrier"):
        time.sleep(1.5)
    assert ends == []


def test_one_that_falls_silent_ends_all(watches: Make, ends: list[str]) -> None:
    """Its thread stops without a word, as with its process or its machine."""
    one, two, _ = watches(3)
    two.doing("drawing class images: 14 of 200")
    until(lambda: one._heard[1].doing.startswith("drawing"))
    two._over.set()
    until(lambda: len(ends) == 2)
    told = "nothing has been heard for 0 s of process 1, which was at drawing class images: 14 of 200"
    assert all(told in said for said in ends) and {said[:6] for said in ends} == {"rank 0", "rank 2"}


def test_a_silent_main_process_ends_all(watches: Make, ends: list[str]) -> None:
    one, _, _ = watches(3)
    one._over.set()
    until(lambda: len(ends) == 2)
    assert all("the main process or its machine has said nothing for" in said for said in ends)


class Sibling:
    """A child of this process in the place of rank 1, whose launcher is this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.process = subprocess.Popen(["sleep", "60"])
        monkeypatch.setattr(waiting.os, "getppid", os.getpid)
        store: Any = HashStore()
        store.set("1", json.dumps(asdict(State(parent=os.getpid(), pid=self.process.pid, doing="step 7"))))
        self.watch = Watch(0, 2, store, 60.0, range(2))
        until(lambda: self.watch._siblings)


@pytest.fixture
def sibling(ends: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Sibling]:
    monkeypatch.setattr(waiting, "PATIENCE", 0.5)
    made = Sibling(monkeypatch)
    yield made
    made.watch._over.set()
    made.process.kill()
    made.process.wait()


def test_one_that_is_stopped_is_killed_by_those_beside_it(sibling: Sibling, ends: list[str]) -> None:
    """Long before its silence is one; a moment's stop, as of one that looks at it, is nothing."""
    sibling.process.send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    sibling.process.send_signal(signal.SIGCONT)
    time.sleep(0.6)
    assert not ends and not sibling.watch._why
    sibling.process.send_signal(signal.SIGSTOP)
    until(lambda: ends)
    assert f"process 1 (pid {sibling.process.pid}) was stopped for" in ends[0]
    assert sibling.process.wait(5) == -signal.SIGKILL


def test_one_that_is_gone_is_missed(sibling: Sibling, ends: list[str]) -> None:
    sibling.process.kill()
    until(lambda: ends)
    assert f"process 1 (pid {sibling.process.pid}) has gone without a word; it was at step 7" in ends[0]


def test_an_interpreter_that_is_held_for_long_ends_nobody(sibling: Sibling, ends: list[str]) -> None:
    """Native code that keeps a process from speaking: it lives, and says nothing for longer than patience lasts."""
    time.sleep(1.5)
    assert not ends and not sibling.watch._why


def test_what_is_asked_of_the_store_grows_with_the_processes_and_not_with_their_square(
    watches: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[int] = Counter()

    class Counting(HashStore):  # type: ignore[misc]
        def multi_get(self, names: list[str]) -> list[bytes]:
            read[len(names)] += 1
            return super().multi_get(names)  # type: ignore[no-any-return]

    watches(16, store=Counting())
    until(lambda: read[16] >= 3 and read[1] >= 40)
    assert set(read) == {1, 16}, "the main process reads all, all others one"
    assert read[1] > 8 * read[16]


def test_one_that_fails_tells_its_traceback(watches: Make, ends: list[str]) -> None:
    _, two = watches(2)
    try:
        raise UserError("pictures/7.png: there is no such file")
    except UserError as error:
        two.leave(error)
    until(lambda: ends)
    assert "rank 0: process 1 has failed:\nTraceback" in ends[0]
    assert "UserError: pictures/7.png: there is no such file" in ends[0]


def test_one_that_has_finished_or_was_stopped_ends_nobody(watches: Make, ends: list[str]) -> None:
    """The main process still writes a report when the others are gone."""
    _, two, three = watches(3)
    two.leave(None)
    three.leave(Stopped("SIGTERM: stopped after step 5"))
    time.sleep(1.2)
    assert ends == []


def test_a_connection_that_breaks_waits_for_the_reason(watches: Make, ends: list[str]) -> None:
    """What gloo says of another's death is heard first; why it died is worth waiting for."""
    one, two = watches(2)
    two.leave(ValueError("out of coffee"))
    with pytest.raises(RuntimeError, match="closed by peer"), one.waiting("gather"):
        raise RuntimeError("Connection closed by peer")
    assert len(ends) == 1 and "out of coffee" in ends[0]


def test_processes_that_wait_for_one_another_end(watches: Make, ends: list[str]) -> None:
    one, two = watches(2)
    with one.waiting("barrier"), two.waiting("gather"):
        until(lambda: ends)
    assert "processes wait for one another: process 0: barrier, process 1: gather" in ends[0]


def test_waiting_inside_waiting_is_one_call(watches: Make) -> None:
    (one,) = watches(1)
    with one.waiting("broadcast"), one.waiting("gather"):
        assert one._mine.where == "broadcast"
    assert (one._mine.calls, one._mine.where) == (1, "")


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([State(calls=3, where="barrier"), State(calls=3, where="barrier")], False),  # it is going on
        ([State(calls=3, where="barrier"), State(calls=2)], False),  # the second works
        ([State(calls=3), State(calls=3)], False),
        ([State(calls=3, where="barrier"), State(calls=4, where="barrier")], True),
        ([State(calls=3, where="barrier"), State(calls=3, where="gather")], True),
        ([State(calls=3, where="barrier"), State(calls=3, left=True)], False),  # it has taken part
        ([State(calls=3, where="barrier"), State(calls=2, left=True)], True),  # it never will
        ([State(left=True), State(left=True)], False),
    ],
)
def test_what_no_time_would_mend(states: list[State], expected: bool) -> None:
    assert crossed(states) is expected


def test_a_line_says_who_waits_for_whom_and_what_that_one_does() -> None:
    busy = State(calls=3, doing="Drawing 200 class images: 14 of 200")
    states = [busy, State(calls=4, where="barrier"), State(calls=4, where="barrier")]
    assert who_waits(states, [10.0, 61.0, 60.0]) == (
        "rank 1, 2 waited 61 s (barrier) for process 0 (Drawing 200 class images: 14 of 200)"
    )
    assert who_waits(states, [90.0, 59.0, 59.0]) == "", "none has waited for a minute"
    assert who_waits([busy, busy], [90.0, 90.0]) == "", "a long step is nobody's wait"


@pytest.mark.parametrize("said", ["five", "", "0", "-3", "nan", "inf", "1e12"])
def test_a_silence_that_is_no_time_is_refused(said: str) -> None:
    with pytest.raises(UserError, match=f"FINETUNE_SILENCE is '{said}'"):
        waiting._silence(said)


def test_a_silence_is_so_many_seconds() -> None:
    assert waiting._silence("60") == 60.0
