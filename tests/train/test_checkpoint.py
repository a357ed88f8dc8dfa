from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from finetune.files import PARTIAL
from finetune.train import checkpoint
from finetune.train.checkpoint import Snapshot


def snapshot(step: int) -> Snapshot:
    return Snapshot(
        step=step,
        trained={"a.weight": torch.full((2, 3), float(step))},
        average={"a.weight": torch.full((2, 3), step / 2)},
        optimizer={"a.weight/step": torch.tensor(float(step)), "a.weight/exp_avg": torch.randn(2, 3)},
        facts={"world": 2, "scaler": {}},
    )


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    saved = snapshot(7)
    loaded = checkpoint.load(checkpoint.save(tmp_path, saved, keep=2))
    assert (loaded.step, loaded.facts) == (7, {"world": 2, "scaler": {}})
    for there, here in ((saved.trained, loaded.trained), (saved.average, loaded.average)):
        assert there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in there)
    assert all(torch.equal(saved.optimizer[name], loaded.optimizer[name]) for name in saved.optimizer)


def test_only_the_newest_are_kept_and_others_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    for step in (1, 2, 10, 1234567):
        checkpoint.save(tmp_path, snapshot(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-000010", "step-1234567"]


def test_nothing_is_removed_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, snapshot(step), keep=2)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, snapshot(3), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]
    assert checkpoint.newest(tmp_path) == tmp_path / "step-000002"


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "no manifest", "bad manifest", "empty folder"])
def test_a_damaged_one_is_passed_over_and_named(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, snapshot(step), keep=2)
    newest = tmp_path / "step-000002"
    tensors = newest / "state.safetensors"
    match damage:
        case "cut":
            tensors.write_bytes(tensors.read_bytes()[:-1])
        case "flip":
            content = bytearray(tensors.read_bytes())
            content[-1] ^= 1
            tensors.write_bytes(content)
        case "missing":
            (newest / "optimizer.safetensors").unlink()
        case "no manifest":
            (newest / "manifest.json").unlink()
        case "bad manifest":
            (newest / "manifest.json").write_text("[1, 2")
        case "empty folder":
            shutil.rmtree(newest)
            newest.mkdir()
    said: list[str] = []
    assert checkpoint.newest(tmp_path, said.append) == tmp_path / "step-000001"
    assert len(said) == 1 and "step-000002" in said[0]


def test_a_damaged_one_is_written_anew_when_its_step_comes_again(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, snapshot(1), keep=2)
    (path / "state.json").write_text("{}")
    checkpoint.save(tmp_path, snapshot(1), keep=2)
    assert checkpoint.is_valid(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000001"]


def test_a_damaged_newer_one_does_not_push_out_a_valid_one(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, snapshot(step), keep=2)
    for later in ("step-000008", "step-000009"):
        (tmp_path / later).mkdir()
    checkpoint.save(tmp_path, snapshot(3), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "nowhere") is None
    (tmp_path / f"{PARTIAL}1-step-000001").mkdir()
    assert checkpoint.newest(tmp_path) is None
