"""Runs in which something goes wrong at random, each of which must end, and then go on to its end.

    python tests/distributed/hang_hunt.py --runs 50 --seed 0

A run ends when it is finished, is stopped with a valid checkpoint, or has failed and said why. One whose processes say
nothing and compute nothing for a minute hangs, and so does one of more than five minutes. Whatever came of it, it is
started again without fault and must finish; a toy as if nothing had been.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from launching import ROOT, TOY, alone, profile, together, toy
from PIL import Image
from safetensors.torch import load_file

from finetune.families.tiny import write_tiny_sd
from finetune.train import checkpoint

FAULTY = Path(__file__).with_name("faulty_run.py")
WATCHDOG = 60.0  # seconds in which nothing happens
LONGEST = 300.0  # seconds after the processes have met
BEATING = 3.0  # seconds of computing, above what it takes to say that one lives
STARTING = 240.0  # seconds for that: two cores import for four processes and more
STEPS = 6
PLACES = ("start", "barrier", "cache", "engine", "step", "backward", "save", "finish")
INSIDE = ("raise", "missing", "kill", "exit", "slow", "term", "usr1", "int", "twice", "stop")


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        kind: of run: a toy; a LoRA of pictures of mixed sizes; DreamBooth that draws class images and previews.
        fault: inside the run, as ``faulty_run`` has it; or None.
        outside: a signal that comes from outside, to one process, all or the launcher, seconds after they have met.
    """

    number: int
    kind: str
    profile: str
    world: int
    fault: dict[str, Any] | None
    outside: tuple[str, str, float] | None


@dataclass(frozen=True)
class Ended:
    """What came of a run: finished, stopped, failed, signalled before there was anything to save; or one of HUNG,
    SILENT, BROKEN.
    """

    how: str
    seconds: float
    said: str


def cases(runs: int, seed: int) -> list[Case]:
    """The runs of a seed: most faults come from inside, a third from outside, a tenth has none."""
    rng = random.Random(seed)
    found = []
    for number in range(runs):
        kind = rng.choices(("toy", "sizes", "prior"), (5, 2, 2))[0]
        name = rng.choice(("cpu-2", "zero2", "zero3", "fsdp2"))
        world = rng.choice((2, 4)) if kind == "prior" else 2
        fault = outside = None
        match rng.choices(("inside", "outside", "none"), (6, 3, 1))[0]:
            case "inside":
                places = [*PLACES, *(("class image", "preview") if kind == "prior" else ())]
                fault = {"where": rng.choice(places), "what": rng.choice(INSIDE), "seconds": 12}
                often = fault["where"] in ("barrier", "step", "backward")
                fault |= {"count": rng.randint(1, 3) if often else 1}
                fault |= {"rank": 0 if fault["where"] == "save" else rng.randrange(world)}
            case "outside":
                name_of = rng.choice(("KILL", "TERM", "INT", "USR1"))
                to = rng.choice(("one", "all") if name_of == "KILL" else ("one", "all", "launcher"))
                outside = (name_of, to, 4 * rng.random())
        found.append(Case(number, kind, name, world, fault, outside))
    return found


class Hunt:
    """A folder with what runs are made of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_tiny_sd(folder / "model")
        for number, size in enumerate([(48, 16), (16, 48), (32, 32), (24, 24)]):
            (folder / "pictures").mkdir(exist_ok=True)
            Image.new("RGB", size, (40, 50 * number, 90)).save(folder / "pictures" / f"{number}.png")
        alone(TOY, toy(folder / "clean.json", folder / "clean", batch_size=4, steps=STEPS))
        self.clean = load_file(folder / "clean" / "adapters" / "toy.safetensors")

    def run(self, case: Case) -> tuple[Case, Ended, Ended]:
        """What came of a case, and of starting it again."""
        place = self.folder / f"{case.number}"
        place.mkdir()
        first = self._launch(case, place)
        if first.how == "stopped" and checkpoint.newest(place / "run" / "checkpoints") is None:
            first = Ended("BROKEN", first.seconds, f"stopped without a checkpoint\n{first.said}")
        again = self._again(case, place)
        if again.how == "finished" and case.kind == "toy":
            ours = load_file(place / "run" / "adapters" / "toy.safetensors")
            if any(float(value.sub(self.clean[name]).abs().max()) > 1e-5 for name, value in ours.items()):
                again = Ended("BROKEN", again.seconds, "its weights are not those of a run that nothing happened to")
        return case, first, again

    def _launch(self, case: Case, place: Path) -> Ended:
        options = self.options(case, place, [case.fault] if case.fault else [])
        launcher = [sys.executable, "-m", "finetune.launch", *profile(case.profile, place)]
        processes = ["--num_processes", str(case.world)]
        environment = {**os.environ, "FINETUNE_SILENCE": "8"}
        log = place / "log.txt"
        with log.open("w") as stream:
            command = [*launcher, *processes, str(FAULTY), options]
            started = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, start_new_session=True)
        met = self._meet(started, log)
        if case.outside:
            send(started.pid, *case.outside)
        code = watched(started, log)
        return Ended(judge(code, log.read_text(), case.outside), time.monotonic() - met, log.read_text())

    def _again(self, case: Case, place: Path) -> Ended:
        """Without a launcher, which has nothing to do."""
        launcher = [*profile(case.profile, place), "--num_processes", str(case.world)]
        begun = time.monotonic()
        code, said = together(launcher, FAULTY, self.options(case, place, []), timeout=LONGEST)
        seconds = time.monotonic() - begun
        return Ended("HUNG" if seconds > LONGEST else judge(code, said), seconds, said)

    def _meet(self, started: subprocess.Popen[bytes], log: Path) -> float:
        begun = time.monotonic()
        while started.poll() is None and time.monotonic() - begun < STARTING:
            if "processes (" in log.read_text():
                break
            time.sleep(0.1)
        return time.monotonic()

    def options(self, case: Case, place: Path, faults: list[dict[str, Any]]) -> str:
        """The argument of ``faulty_run.py`` for a run in ``place/run``; its path."""
        path, batch_size = place / "options.json", 4 // case.world
        options = {"faults": faults, "pause": 0.2}
        toy(path, place / "run", options, batch_size=batch_size, steps=STEPS)
        values = json.loads(path.read_text())
        recipe = values["recipe"]
        recipe["checkpoint"] = {"every": 2, "keep": 2}
        if case.kind != "toy":
            concept = {"folder": str(self.folder / "pictures"), "prompt": "a photo of zib star", "trigger": "zib"}
            recipe |= {
                "recipe": "lora",
                "adapter": {"kind": "lora", "rank": 2},
                "model": {"path": str(self.model)},
                "data": {"resolution": 16, "concepts": [concept], "cache": {"folder": str(place / "cache")}},
                "report": {"enabled": False},
            }
            if case.kind == "sizes":
                recipe["data"]["buckets"] = {"step": 8}
            else:
                concept["class_prompt"] = "a photo of a star"
                recipe["recipe"] = "dreambooth"
                recipe["prior"] = {"kind": "images", "count": 6, "sampler": {"steps": 1}, "batch_size": 1}
                recipe["samples"] = {"every": 3, "sampler": {"steps": 1}, "prompts": ["a zib star"]}
        path.write_text(json.dumps(values))
        return str(path)


def send(launcher: int, name: str, to: str, after: float) -> None:
    """A signal to a launcher, to its processes, or to the last of them."""
    time.sleep(after)
    with suppress(psutil.Error):  # they have ended before
        workers = [one for one in children(launcher) if "RANK" in one.environ()]
        to_them = {"all": workers, "one": workers[-1:], "launcher": [psutil.Process(launcher)]}
        for one in to_them[to]:
            one.send_signal(getattr(signal, f"SIG{name}"))


def watched(started: subprocess.Popen[bytes], log: Path) -> int | None:
    """The exit code; None, and the processes are gone, where nothing happens any more."""
    begun = moved = time.monotonic()
    length, computed = 0, 0.0
    while started.poll() is None:
        now, said, did = time.monotonic(), log.stat().st_size, computing(started.pid)
        if said > length or did > computed + BEATING or did < computed:
            moved, length, computed = now, said, did
        if now - moved > WATCHDOG or now - begun > LONGEST:
            for process in [*children(started.pid), started]:
                process.kill()
            started.wait()
            return None
        time.sleep(0.5)
    return started.returncode


def children(launcher: int) -> list[psutil.Process]:
    """The processes of a launcher."""
    try:
        return psutil.Process(launcher).children(recursive=True)
    except psutil.Error:
        return []


def computing(launcher: int) -> float:
    """Seconds that a launcher's processes have computed."""
    seconds = 0.0
    for process in children(launcher):
        with suppress(psutil.Error):
            seconds += process.cpu_times().user
    return seconds


def judge(code: int | None, said: str, outside: tuple[str, str, float] | None = None) -> str:
    """How a run ended, by its exit code and by what it said; what came from ``outside`` to a launcher is its code."""
    if code is None:
        return "HUNG"
    if code == 0:
        return "finished"
    if "stopped after step" in said:
        return "stopped"
    if outside and outside[1] == "launcher" and code == 128 + getattr(signal, f"SIG{outside[0]}"):
        return "signalled"
    told = ("Traceback (most recent call last)", " ends: ", "there is no such file", "Signal ")
    return "failed" if any(words in said for words in told) else "SILENT"


def hunt(folder: Path, chosen: Sequence[Case], jobs: int = 2) -> list[tuple[Case, Ended, Ended]]:
    """Run them, ``jobs`` at a time, and say of each what came of it."""
    hunted = Hunt(folder)
    found = []
    with ThreadPoolExecutor(jobs) as pool:
        for case, first, again in pool.map(hunted.run, chosen):
            what = case.fault or case.outside or "nothing"
            times = f"{first.seconds:.0f} s, then {again.how} in {again.seconds:.0f} s"
            print(
                f"{case.number:3} {case.kind:5} {case.profile:5} x{case.world} {what}: {first.how} in {times}",
                flush=True,
            )
            found.append((case, first, again))
    return found


def bad(found: list[tuple[Case, Ended, Ended]]) -> list[tuple[Case, Ended, Ended]]:
    """Those that hung, ended without a word, or did not go on to their end."""
    return [one for one in found if one[1].how.isupper() or one[2].how != "finished"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--folder", type=Path, help="keeps what the runs wrote and said")
    asked = parser.parse_args()
    os.environ["PYTHONPATH"] = f"{TOY.parent}{os.pathsep}{ROOT}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = hunt(folder, cases(asked.runs, asked.seed), asked.jobs)
        print(dict(Counter(first.how for _, first, _ in found)), "then", dict(Counter(one.how for _, _, one in found)))
        for case, first, again in bad(found):
            print(f"---- {case}\n{first.said}\n---- again\n{again.said}")
        raise SystemExit(bool(bad(found)))


if __name__ == "__main__":
    main()
