"""A WD tagger by a stand-in for its network: what it is shown, and what is made of its numbers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.captioning import loading
from data_tools.captioning.captioner import Decoding
from data_tools.captioning.models import kind_of, load_captioner
from data_tools.captioning.tagger import Tagger, Thresholds, spoken, squared
from finetune.errors import UserError

TAGS = """\
tag_id,name,category,count
1,general,9,10
2,long_hair,0,10
3,^_^,0,10
4,zib_(world),4,10
5,dog,0,10
"""


class Network:
    """Answers as told, and remembers the pictures."""

    def __init__(self, answer: Sequence[float], most: int | str = "batch") -> None:
        self.answer, self.most = np.array(answer, np.float32), most
        self.seen: list[np.ndarray[Any, Any]] = []

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="input", shape=[self.most, 8, 8, 3])]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(shape=[self.most, len(self.answer)])]

    def run(self, outputs: None, inputs: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        self.seen.append(inputs["input"])
        return [np.stack([self.answer for _ in inputs["input"]])]


@pytest.fixture
def source(tmp_path: Path) -> loading.Source:
    (tmp_path / "selected_tags.csv").write_text(TAGS, encoding="utf-8")
    return loading.find(str(tmp_path))


def test_likely_tags_are_written_the_likeliest_first(source: loading.Source) -> None:
    tagger = Tagger(source, Thresholds(), Network([0.99, 0.4, 0.5, 0.84, 0.34]))
    assert [caption.text for caption in tagger.captions([Image.new("RGB", (9, 9))])] == ["^_^, long hair"]
    generous = Tagger(source, Thresholds(0.3, 0.8), Network([0.99, 0.4, 0.5, 0.84, 0.34]))
    assert generous.captions([Image.new("RGB", (9, 9))])[0].text == "zib (world), ^_^, long hair, dog"


def test_pictures_lie_on_a_white_square_with_blue_first(source: loading.Source) -> None:
    pixels = squared(Image.new("RGB", (8, 4), (200, 100, 50)), 8)
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.float32
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[4, 4].tolist() == [50, 100, 200]


def test_a_network_for_one_picture_gets_one_at_a_time(source: loading.Source) -> None:
    one, many = Network([0, 1, 0, 0, 0], 1), Network([0, 1, 0, 0, 0])
    images = [Image.new("RGB", (9, 9), (index, 0, 0)) for index in range(3)]
    assert Tagger(source, Thresholds(), one).captions(images) == Tagger(source, Thresholds(), many).captions(images)
    assert [len(seen) for seen in one.seen] == [1, 1, 1] and [len(seen) for seen in many.seen] == [3]
    assert np.array_equal(np.concatenate(one.seen), many.seen[0])


@pytest.mark.parametrize(
    ("tag", "expected"),
    [("long_hair", "long hair"), ("^_^", "^_^"), ("o_o", "o_o"), ("<|>_<|>", "<|>_<|>"), ("1girl", "1girl")],
)
def test_faces_keep_their_underscores(tag: str, expected: str) -> None:
    assert spoken(tag) == expected


def test_without_onnxruntime_it_says_what_to_install(source: loading.Source, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kind_of(source) == "tagger"
    with pytest.raises(UserError, match=r"has selected_tags.csv, but no model.onnx"):
        load_captioner(source, Decoding(), None, Thresholds())
    (source.folder / "model.onnx").touch()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs onnxruntime: pip install 'finetune\[caption\]'"):
        load_captioner(source, Decoding(), None, Thresholds())
    with pytest.raises(UserError, match="a tagger follows none"):
        load_captioner(source, Decoding(), "describe it", Thresholds())


def test_a_list_of_tags_that_does_not_fit_is_refused(source: loading.Source) -> None:
    with pytest.raises(UserError, match="has 5 tags, but the network gives 2 numbers"):
        Tagger(source, Thresholds(), Network([0, 0]))
    (source.folder / "selected_tags.csv").write_text("name\ndog\n", encoding="utf-8")
    with pytest.raises(UserError, match="no list of tags with the columns name and category"):
        Tagger(source, Thresholds(), Network([0]))
