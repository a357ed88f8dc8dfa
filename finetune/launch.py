"""``accelerate launch``, in whose process the toolkit's exit codes and signals survive.

    python -m finetune.launch [options of accelerate launch] SCRIPT [arguments]

Accelerate hands several processes to torch's elastic agent. The agent ends with 1 whatever its processes ended with,
starts them again after a recipe's mistake as after a crash (``--max_restarts``), and dies of SIGUSR1, by which
schedulers announce the end of their time. Here a process that ends with a word of its own (``exit_codes``) is listened
to: its code becomes the launcher's, and it is not started again. SIGUSR1, SIGTERM, SIGINT, SIGHUP and SIGQUIT go on to
the processes, which have TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (30) to write their checkpoint.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch.distributed.launcher.api as elastic
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from finetune.config.command import LAST_WORDS, exit_codes
from finetune.errors import UserError

_PASSED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")


class Agent(LocalElasticAgent):
    """Torch's agent of one machine, which starts nothing again that has ended with a word."""

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        for word in _folder().iterdir():  # of processes that were stopped for others' sake
            word.unlink()
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed() and _last_word() is not None:
            self._remaining_restarts = 0
        return result


def launch(arguments: Sequence[str]) -> int:
    """Run ``accelerate launch`` in this process and return the exit code of what it started.

    That is the toolkit's where a process has said one, else the script's own where one process was started, else 1;
    128 + the signal's number where a signal came before there was anything to save.

    Raises:
        UserError: the launcher refuses its arguments, or processes that start again would not find each other.
    """
    options = launch_command_parser().parse_args(list(arguments))
    elastic.LocalElasticAgent = Agent  # type: ignore[attr-defined]
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(_PASSED_ON))  # torchrun's way of saying --signals-to-handle
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun has it, which would say so; processes choose their own
    if options.max_restarts:
        _prepare_restarts(options)
    for name in _PASSED_ON:
        signal.signal(getattr(signal, name), _pass_on)  # while there is no agent, which has handlers of its own
    with tempfile.TemporaryDirectory(prefix="finetune-launch-") as folder:
        os.environ[LAST_WORDS] = folder
        try:
            launch_command(options)
        except ChildFailedError as error:
            code = _last_word()
            if code is None:
                print(error, file=sys.stderr, flush=True)
            return 1 if code is None else code
        except SignalException as error:
            return _last_word() or 128 + error.sigval
        except subprocess.CalledProcessError as error:
            code = error.returncode
            return _last_word() or (code if code > 0 else 128 - code)
        except (ValueError, ConnectionError) as error:
            raise UserError(f"accelerate launch: {error}") from None
    return 0


def _prepare_restarts(options: Namespace) -> None:
    """Let processes that start again meet at a store without the addresses of those before them.

    The agent's own store keeps them, and gloo would wait for the dead: with a static rendezvous always, and with c10d
    unless its store is not shared with the processes.
    """
    machines = options.num_machines or (load_config_from_file(options.config_file).num_machines)
    if machines == 1:
        os.environ.setdefault("PET_STANDALONE", "1")  # c10d at a free port
        os.environ.setdefault("PET_LOCAL_ADDR", "127.0.0.1")
    elif options.rdzv_backend == "static":
        raise UserError("--max_restarts on several machines needs --rdzv_backend c10d")
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


def _folder() -> Path:
    return Path(os.environ[LAST_WORDS])


def _last_word() -> int | None:
    """The exit code that processes of this machine have said; where they differ, the gravest."""
    return max((int(file.read_text()) for file in _folder().iterdir()), default=None)


def _pass_on(number: int, frame: FrameType | None) -> None:
    children = psutil.Process().children()
    for child in children:
        child.send_signal(number)
    if not children:
        raise SystemExit(128 + number)


if __name__ == "__main__":
    with exit_codes():
        raise SystemExit(launch(sys.argv[1:]))
