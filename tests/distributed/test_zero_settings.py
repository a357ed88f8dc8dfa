"""What DeepSpeed's settings may say about disks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT

from finetune.engines.zero_settings import _settings_file
from finetune.errors import UserError


def settings(folder: Path, **zero: Any) -> Path:
    """The shipped settings for NVMe with other values."""
    shipped = json.loads((ROOT / "launch" / "deepspeed" / "zero3-nvme.json").read_text())
    shipped["zero_optimization"] |= zero
    (folder / "ds.json").write_text(json.dumps(shipped))
    return folder / "ds.json"


def on_disk(folder: Path) -> dict[str, str]:
    return {"device": "nvme", "nvme_path": str(folder)}


def test_an_optimizer_on_a_disk_is_refused(tmp_path: Path) -> None:
    """Its stretches are empty in memory between steps, and a checkpoint would be written from them."""
    with pytest.raises(UserError, match=r"ds\.json: offload_optimizer\.device is 'nvme'.*take 'cpu'"):
        _settings_file(settings(tmp_path, offload_optimizer=on_disk(tmp_path)))


@pytest.mark.parametrize("folder", ["", "relative", "/there/is/none"])
def test_a_disk_has_a_folder(folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"offload_param\.nvme_path is '.*expected a writable folder"):
        _settings_file(settings(tmp_path, offload_param={"device": "nvme", "nvme_path": folder or None}))


@pytest.mark.parametrize(("installed", "compiles"), [(True, False), (False, True), (False, False)])
def test_without_libaio_it_is_said_before_anything_is_compiled(
    installed: bool, compiles: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed import git_version_info
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(git_version_info, "installed_ops", {"async_io": installed})
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: compiles)
    path = settings(tmp_path, offload_param=on_disk(tmp_path))
    if installed or compiles:
        assert _settings_file(path) == path
    else:
        with pytest.raises(UserError, match=r"needs a C\+\+ compiler and libaio .*apt-get install g\+\+ libaio-dev"):
            _settings_file(path)


def test_the_host_is_no_disk(tmp_path: Path) -> None:
    path = settings(tmp_path, offload_param={"device": "cpu"}, offload_optimizer=None)
    assert _settings_file(path) == path
