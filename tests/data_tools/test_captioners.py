"""Each kind of model through its own files: loaded by path, the same words alone as in a batch, nothing hidden."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_captioners import photographs, write_qwen2_vl
from transformers.utils import is_torchvision_available

from data_tools.captioning import loading
from data_tools.captioning.captioner import Captioner, Decoding
from data_tools.captioning.chat import Chat
from data_tools.captioning.models import kind_of, load_captioner
from data_tools.captioning.tagger import Thresholds
from finetune.errors import UserError
from finetune.randomness import generator

Make = Callable[[str], Path]
KINDS = {"blip": "blip", "blip-2 opt": "blip-2", "blip-2 t5": "blip-2", "florence2": "florence2", "llava": "chat"}
SHORT = Decoding(max_new_tokens=8)


def load(folder: Path, instruction: str | None = None, decoding: Decoding = SHORT) -> Captioner:
    return load_captioner(loading.find(str(folder)), decoding, instruction, Thresholds())


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_is_the_same_alone_and_in_a_batch(tiny_model: Make, kind: str) -> None:
    folder = tiny_model(kind)
    assert kind_of(loading.find(str(folder))) == KINDS[kind]
    captioner = load(folder)
    images = photographs(4)
    together = captioner.captions(images)
    assert together == [caption for image in images for caption in captioner.captions([image])]
    assert len({caption.text for caption in together}) > 1, "a model that sees nothing would pass"
    assert any(caption.text for caption in together)
    assert captioner.captions(images) == together


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_named_by_their_generators_alone(tiny_model: Make, kind: str) -> None:
    captioner = load(tiny_model(kind), decoding=Decoding(max_new_tokens=8, temperature=5.0, top_p=1.0))
    image = photographs(1)[0]
    before = torch.get_rng_state()
    likely, *samples = captioner.captions([image] * 4, [None, *(generator(0, "test", number) for number in range(3))])
    assert torch.equal(before, torch.get_rng_state())
    assert likely == captioner.captions([image])[0]
    assert len({caption.text for caption in samples}) > 1
    assert samples[1] == captioner.captions([image], [generator(0, "test", 1)])[0]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_precisions_run(tiny_model: Make, kind: str, precision: loading.Precision) -> None:
    source = loading.find(str(tiny_model(kind)), precision=precision)
    assert source.dtype == getattr(torch, precision)
    captions = load_captioner(source, SHORT, None, Thresholds()).captions(photographs(4))
    assert any(caption.text for caption in captions)


def test_a_beam_search_is_asked_for(tiny_model: Make) -> None:
    images = photographs(3)
    wide = load(tiny_model("llava"), decoding=Decoding(max_new_tokens=8, beams=4))
    assert wide.captions(images) == [caption for image in images for caption in wide.captions([image])]
    assert wide.captions(images) != load(tiny_model("llava")).captions(images)


def test_what_the_files_say_of_sampling_does_not_count(tiny_model: Make, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llava"), tmp_path / "model"))
    told = {"do_sample": True, "temperature": 5.0, "num_beams": 3, "eos_token_id": 2, "pad_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(told), encoding="utf-8")
    assert load(folder).captions(photographs()) == load(tiny_model("llava")).captions(photographs())


def test_blip_goes_on_with_an_opening(tiny_model: Make) -> None:
    plain, opened = (load(tiny_model("blip"), instruction) for instruction in (None, "a photo of"))
    images = photographs()
    assert all(caption.text.startswith("a photo of") for caption in opened.captions(images))
    assert opened.captions(images) != plain.captions(images)


@pytest.mark.parametrize("kind", ["blip-2 opt", "blip-2 t5", "llava"])
def test_an_instruction_changes_the_caption_and_is_no_part_of_it(tiny_model: Make, kind: str) -> None:
    plain, asked = (load(tiny_model(kind), instruction) for instruction in (None, "what does this image describe"))
    images = photographs()
    assert asked.captions(images) != plain.captions(images)
    assert not any("what does this image describe" in caption.text for caption in asked.captions(images))


def test_florence_takes_a_task_and_no_sentence(tiny_model: Make) -> None:
    short, long = (load(tiny_model("florence2"), task) for task in (None, "<DETAILED_CAPTION>"))
    assert short.captions(photographs()) != long.captions(photographs())
    with pytest.raises(UserError, match="did you mean '<CAPTION>'"):
        load(tiny_model("florence2"), "<CAPTIONS>")
    with pytest.raises(UserError, match="takes a task and no sentence, found 'what is this'"):
        load(tiny_model("florence2"), "what is this")


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_that_took_all_its_tokens_is_marked(tiny_model: Make, kind: str) -> None:
    images = photographs(4)
    brief = load(tiny_model(kind), decoding=Decoding(max_new_tokens=2)).captions(images)
    long = load(tiny_model(kind), decoding=Decoding(max_new_tokens=40)).captions(images)
    assert any(caption.full for caption in brief)
    for short, whole in zip(brief, long, strict=True):
        assert short.full or whole.text == short.text


def test_qwen_sees_pictures_of_different_sizes_in_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prompts differ in length: with padding at the wrong side, answers would follow padding."""
    folder, processor = write_qwen2_vl(tmp_path / "qwen")
    monkeypatch.setattr(loading.Source, "processor", lambda self: processor())
    captioner = load(folder)
    assert isinstance(captioner, Chat)
    images = photographs(4)
    together = captioner.captions(images)
    assert together == [caption for image in images for caption in captioner.captions([image])]
    assert len({caption.text for caption in together}) > 1


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is there")
def test_a_processor_that_needs_torchvision_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"need torchvision: pip install 'finetune\[caption\]'"):
        load(write_qwen2_vl(tmp_path / "qwen")[0])


def test_weights_that_are_missing_are_not_made_up(tiny_model: Make, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("blip"), tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "crossattention" in name)
    save_file(
        {name: value for name, value in weights.items() if name != lost}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match=f"1 weights that transformers expects are not in its files, such as {lost}"):
        load(folder)


def test_a_chat_model_without_a_template_is_refused(tiny_model: Make, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llava"), tmp_path / "model"))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        load(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "blip2"}, "cannot describe a picture with a 'blip2'; did you mean 'blip-2'"),
        ({}, "has neither a config.json with a model_type nor selected_tags.csv"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, config: dict[str, str], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_a_path_that_is_not_there_is_never_asked_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "blip-base").mkdir()
    with pytest.raises(UserError, match="did you mean 'blip-base'"):
        loading.find(str(tmp_path / "blip-bsae"))


def test_only_safe_files_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str | None, list[str]]] = []

    def fetch(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert loading.find("someone/some-model", "v2").folder == tmp_path
    assert {(name, revision) for name, revision, _ in asked} == {("someone/some-model", "v2")}
    patterns = {pattern for _, _, some in asked for pattern in some}
    assert "*.safetensors" in patterns and not patterns & {"*", "*.bin", "*.py", "*.onnx", "model.onnx"}
    (tmp_path / "selected_tags.csv").touch()
    loading.find("someone/some-tagger", None)
    assert "model.onnx" in asked[-1][2] and "*.safetensors" not in asked[-1][2]
