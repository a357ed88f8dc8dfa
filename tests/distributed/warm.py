"""Programs on one process or several that begin at once: they are forked from a process that has imported everything.

What a launcher tells its processes comes from accelerate's own reading of a profile. What is left out is the launcher
itself, which ends all when one fails; tests of that start it for real.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

_LIBRARIES = (
    "torch.distributed.fsdp",
    "accelerate",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "peft",
    "safetensors.torch",
    "tensorboard",
)
_MODELS = ("transformers.models.clip.modeling_clip", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
_OURS = ("finetune.finish", "finetune.preview", "finetune.adapters", "finetune.data", "finetune.train")
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([*_LIBRARIES, *_MODELS, *_OURS])
_GRACE = 15.0  # seconds in which the others end by themselves when one has failed, or are ended


def told(launcher: list[str]) -> Iterator[dict[str, str]]:
    """The environment of each process that ``accelerate launch`` would start."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    asked, known, _ = _validate_launch_command(launch_command_parser().parse_args([*launcher, "program.py"]))
    if asked.use_deepspeed:
        asked.deepspeed_fields_from_accelerate_config = ",".join(known.deepspeed_config)
        _, said = prepare_deepspeed_cmd_env(asked)
    else:
        assert asked.multi_gpu or asked.use_fsdp, "this profile starts one process"
        said = prepare_multi_gpu_env(asked)
    world = str(asked.num_processes)
    together = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "TORCHELASTIC_RUN_ID": "test"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(asked.master_port)}
    for rank in range(asked.num_processes):
        yield {**said, **together, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}


def run(
    environments: list[Mapping[str, str]], script: Path, arguments: tuple[str, ...], timeout: float
) -> tuple[int, str]:
    """Exit code and output of one process for each environment. None of them outlives the call."""
    started: list[multiprocessing.context.ForkServerProcess] = []
    with TemporaryDirectory() as folder:
        said = [Path(folder) / str(rank) for rank in range(len(environments))]
        try:
            for environment, path in zip(environments, said, strict=True):
                process = _SERVER.Process(target=_become, args=(dict(environment), str(script), arguments, str(path)))
                process.start()
                started.append(process)
            _wait(started, time.monotonic() + timeout)
        finally:
            for process in started:
                process.kill()
                process.join()
        codes = [process.exitcode or 0 for process in started]
        output = "".join(path.read_text() for path in said if path.is_file())
    return next((code for code in codes if code), 0), output


def _wait(started: list[multiprocessing.context.ForkServerProcess], end: float) -> None:
    while any(process.is_alive() for process in started):
        if any(process.exitcode for process in started):
            end = min(end, time.monotonic() + _GRACE)
        if time.monotonic() > end:
            return
        time.sleep(0.02)


def _become(environment: dict[str, str], script: str, arguments: tuple[str, ...], said: str) -> None:
    """Be ``script`` as if Python had been started with it."""
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [script, *arguments]
    sys.path[:0] = [str(Path(script).parent), *filter(None, environment.get("PYTHONPATH", "").split(":"))]
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception as error:
        sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()
