"""Locks that a killed compiler has left behind: said, where torch would wait for ever without a word.

Torch compiles extensions, DeepSpeed's kernels among them, when they are first used, and keeps others away by a file
that it holds open meanwhile. One that no process holds open will not go away by itself.
"""

from __future__ import annotations

import time
from pathlib import Path

import psutil
from torch.utils.file_baton import FileBaton

from finetune.errors import UserError

PATIENCE = 30.0  # seconds without a holder and without a file being written


def watch() -> None:
    """From here on torch waits for another process's compiler as ``wait`` does."""
    FileBaton.wait = wait  # type: ignore[method-assign, assignment]


def wait(baton: FileBaton) -> None:
    """Wait until the lock is gone.

    Raises:
        UserError: nobody holds it, and nothing has happened beside it for ``PATIENCE``.
    """
    path, began, said = Path(baton.lock_file_path), time.monotonic(), 0.0
    while path.exists():
        time.sleep(min(PATIENCE, 0.1))
        waited = time.monotonic() - began
        if waited - said < PATIENCE:
            continue
        said = waited
        if not _held(path) and time.time() - _written(path.parent) > PATIENCE and path.exists():
            raise UserError(
                f"{path}: a lock that no process of this machine holds, left by one that was killed while it compiled; "
                "remove the file and start again"
            )
        print(f"{path}: waited {waited:.0f} s for another process that compiles", flush=True)


def _held(path: Path) -> bool:
    """Whether a process of this machine, as far as it may be looked into, has the file open."""
    for process in psutil.process_iter():
        try:
            if any(Path(file.path) == path for file in process.open_files()):
                return True
        except (psutil.Error, OSError):
            continue
    return False


def _written(folder: Path) -> float:
    """When a file in ``folder`` was last written, in seconds of the clock."""
    times = [0.0]
    for file in folder.iterdir():
        try:
            times.append(file.stat().st_mtime)
        except OSError:
            continue
    return max(times)
