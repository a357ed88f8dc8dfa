"""The figures of docs/data.md can be measured; how fast a machine is, is no matter of a test."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def test_every_part_prints_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).with_name("data.py")
    spec = importlib.util.spec_from_file_location("data_figures", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["pictures", "scan", "cache", "--scale", "0.02", "--turns", "1"])
    told = capsys.readouterr().out
    assert told.count(" times") == 8 + 3 + 1
    module.main(["plan", "--scale", "0.0003"])
    assert "300 pictures: planned in" in capsys.readouterr().out
