"""A lock left by a killed compiler is named, and one that is held is waited for."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from finetune.engines import build_locks
from finetune.errors import UserError


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the lock of an extension called "deepspeed_shm_comm" lies; a minute old."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build_locks, "PATIENCE", 0.3)
    monkeypatch.setattr(FileBaton, "wait", build_locks.wait)
    path = tmp_path / "deepspeed_shm_comm" / "lock"
    path.parent.mkdir()
    path.touch()
    os.utime(path, (time.time() - 60,) * 2)
    return path


def test_a_start_that_would_build_names_the_lock_that_nobody_holds(lock: Path) -> None:
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    with pytest.raises(UserError, match="deepspeed_shm_comm/lock: a lock that no process of this machine holds"):
        ShareMemCommBuilder().load(verbose=False)
    assert lock.exists(), "it may belong to another machine: who removes it is a person"


def test_it_waits_for_a_compiler_that_lives(lock: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its holder does nothing to be seen for a while, then is done."""
    lock.unlink()
    hold = "import sys, time, torch.utils.file_baton as f; b = f.FileBaton(sys.argv[1]); b.try_acquire(); "
    code = f"{hold} print('held', flush=True); time.sleep(1.5); b.release()"
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE)
    assert holder.stdout and holder.stdout.readline() == b"held\n"
    os.utime(lock, (time.time() - 60,) * 2)
    FileBaton(str(lock)).wait()
    assert not lock.exists()
    assert "for another process that compiles" in capfd.readouterr().out
    assert holder.wait(10) == 0


def test_a_lock_beside_which_files_are_written_is_another_machines(lock: Path) -> None:
    def write(_: float) -> None:
        (lock.parent / "object.o").touch()
        if time.monotonic() > until:
            lock.unlink(missing_ok=True)

    until = time.monotonic() + 1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_locks.time, "sleep", write)
        FileBaton(str(lock)).wait()


def test_runs_under_zero_look_out_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.config.schema import TrainConfig
    from finetune.engines import zero_settings

    monkeypatch.setattr(FileBaton, "wait", None)
    monkeypatch.setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", None)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", raising=False)
    zero_settings.plugin(TrainConfig(), on_cpu=True)
    assert FileBaton.wait is build_locks.wait
