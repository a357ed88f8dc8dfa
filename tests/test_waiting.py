"""Processes that watch each other: here as threads of one, which tell each other by a store in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
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
        watch._over.set()

    monkeypatch.setattr(Watch, "_end", end)
    monkeypatch.setattr(waiting, "BEAT", 0.02)
    monkeypatch.setattr(waiting, "GRACE", 0.2)
    return said


@pytest.fixture
def watches(ends: list[str]) -> Iterator[Make]:
    """Makes as many as are asked for, which know each other."""
    made: list[Watch] = []

    def make(world: int, silence: float = 0.5) -> list[Watch]:
        store: Any = HashStore()
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


def test_one_that_falls_silent_ends_the_others(watches: Make, ends: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads stop without a word, as with its process or its machine."""
    killed: list[int] = []
    monkeypatch.setattr(waiting.os, "kill", lambda process, _: killed.append(process))
    one, two, _ = watches(3)
    two.doing("drawing class images: 14 of 200")
    until(lambda: one._heard and one._heard[1].doing.startswith("drawing"))
    two._over.set()
    until(lambda: len(ends) == 2)
    told = "process 1 has said nothing for 0 s, last at: drawing class images: 14 of 200"
    assert all(told in said for said in ends) and {said[:6] for said in ends} == {"rank 0", "rank 2"}
    assert set(killed) == {two._mine.pid}, "a sibling, as its launcher is ours"


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
