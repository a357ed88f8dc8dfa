"""As much of Slurm as a batch script sees: a queue of one job whose machines are all this one.

``srun`` and ``scontrol`` are programs that go onto PATH. What they do is what Slurm's manual pages say: ``srun`` starts
a task on each machine, passes signals on to all of them and ends with the highest of their codes.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from small import install, write_program
from started import Started, started

SRUN = """\
import os, signal, socket, subprocess, sys, time

words = sys.argv[1:]
command = words[words.index("bash"):]
port = int(command[command.index("--main_process_port") + 1])
tasks = []

def pass_on(number, frame):
    for task in tasks:
        task.send_signal(number)

def listening():
    with socket.socket() as held:
        return held.connect_ex(("127.0.0.1", port)) == 0

for name in ("SIGUSR1", "SIGTERM", "SIGINT"):
    signal.signal(getattr(signal, name), pass_on)
for number in range(int(os.environ["SLURM_JOB_NUM_NODES"])):
    tasks.append(subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(number)}))
    while tasks[0].poll() is None and not listening():  # as the first machine alone is where the port is
        time.sleep(0.05)
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """\
case "$1 $2" in
    "show hostnames") tr , '\\n' <<< "$3" ;;
    "requeue $SLURM_JOB_ID") echo "$2" >> {requeued} ;;
    *) echo "scontrol: $*" >&2; exit 1 ;;
esac
"""


class Slurm:
    """One job: a script, its arguments, and how often it asked to be queued again."""

    def __init__(self, folder: Path, script: Path, arguments: Sequence[str | Path], job: int) -> None:
        self._folder, self._script, self._job = folder, script, job
        self._arguments = [str(argument) for argument in arguments]
        self._requeued = folder / "requeued"
        write_program(folder / "bin" / "srun", f"#!{sys.executable}\n{SRUN}")
        scontrol = SCONTROL.format(requeued=shlex.quote(str(self._requeued)))
        write_program(folder / "bin" / "scontrol", f"#!/bin/bash\n{scontrol}")
        install(folder / "bin")
        self.directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", script.read_text(), re.MULTILINE))

    @property
    def requeued(self) -> int:
        return len(self._requeued.read_text().split()) if self._requeued.is_file() else 0

    @contextmanager
    def job(self, path: str, **environment: str) -> Iterator[Started]:
        """Run the batch script once, as Slurm does when the job gets its machines."""
        nodes = self.directives["nodes"]
        given = {
            "PATH": f"{self._folder / 'bin'}:{path}",
            "SLURM_JOB_ID": str(self._job),
            "SLURM_JOB_NUM_NODES": nodes,
            "SLURM_JOB_NODELIST": ",".join(["localhost"] * int(nodes)),
            "PET_LOCAL_ADDR": "127.0.0.1",
        }
        command = ["bash", str(self._script), *self._arguments]
        with started(command, self._folder / "log", **given, **environment) as running:
            yield running
