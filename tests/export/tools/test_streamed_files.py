"""Safetensors written tensor by tensor: the very bytes that the library writes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import UserError
from finetune.export.stream import require_new, shapes, tensors, tensors_of, writing
from finetune.files import write_tensors

TENSORS = {
    "b.x": torch.arange(15.0).view(3, 5).half(),
    "a": torch.tensor(2.0),
    "c": torch.arange(16.0).view(4, 4).t(),
    "i": torch.arange(3),
    "z": torch.ones(3).bfloat16(),
    "y": torch.ones(7).half(),
}


def test_bytes_are_the_librarys(tmp_path):
    said = {"finetune.kind": "lora", "title": "é"}
    write_tensors(tmp_path / "library", TENSORS, said)
    with writing(tmp_path / "deep" / "stream") as writer:
        for name, tensor in reversed(TENSORS.items()):
            writer.add({name: tensor})
        writer.metadata |= said
    assert (tmp_path / "deep" / "stream").read_bytes() == (tmp_path / "library").read_bytes()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["stream"]


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="twice"), writing(tmp_path / "file") as writer:
        writer.add({"a": torch.ones(2)})
        writer.add({"a": torch.ones(2)})
    assert not list(tmp_path.iterdir())


def test_reading_by_the_piece(tmp_path):
    write_tensors(tmp_path / "file", TENSORS)
    assert shapes(tmp_path / "file")["b.x"] == (torch.float16, [3, 5])
    assert torch.equal(tensors(tmp_path / "file", ["c"])["c"], TENSORS["c"])
    assert [key for key, _ in tensors_of(tmp_path / "file")] == sorted(TENSORS)
    assert load_file(tmp_path / "file").keys() == TENSORS.keys()
    (tmp_path / "cut").write_bytes((tmp_path / "file").read_bytes()[:-3])
    with pytest.raises(UserError, match="no whole safetensors"):
        shapes(tmp_path / "cut")
    with pytest.raises(UserError, match="not overwritten"):
        require_new(tmp_path / "file")
