"""What a person gets wrong: one clear message, exit code 2, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from finetune.config.command import run
from recipes import dreambooth

Break = Callable[[Path], list[str]]
WriteRecipe = Callable[..., Path]


def refused(recipe: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a run that must end with 2."""
    with pytest.raises(SystemExit) as ended:
        run(dreambooth.main, ["--config", str(recipe), *overrides])
    assert ended.value.code == 2
    return capsys.readouterr().err


def misspelt_key(_: Path) -> list[str]:
    return ["train.lerning_rate=1e-3"]


def missing_folder(subject: Path) -> list[str]:
    return [f"data.concepts.0.folder={subject.parent / 'subjct'}"]


def empty_folder(subject: Path) -> list[str]:
    (subject.parent / "empty").mkdir()
    return [f"data.concepts.0.folder={subject.parent / 'empty'}"]


def truncated_jpeg(subject: Path) -> list[str]:
    Image.effect_noise((64, 64), 50).convert("RGB").save(subject / "cut.jpg")
    (subject / "cut.jpg").write_bytes((subject / "cut.jpg").read_bytes()[:700])
    return []


def text_named_png(subject: Path) -> list[str]:
    (subject / "note.png").write_text("this is no picture", encoding="utf-8")
    return []


def caption_in_latin_1(subject: Path) -> list[str]:
    (subject / "0.txt").write_bytes("a photo of zib star in a café".encode("latin-1"))
    return []


def class_prompt_with_the_rare_token(_: Path) -> list[str]:
    return ["data.concepts.0.class_prompt=a photo of a zib star"]


def rank_zero(_: Path) -> list[str]:
    return ["adapter.rank=0"]


def pattern_that_matches_nothing(_: Path) -> list[str]:
    return ["adapter.targets=['.*attn7.to_q']"]


def unknown_model(_: Path) -> list[str]:
    return ["model.path=no/such/model/folder"]


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (misspelt_key, ["lerning_rate", "did you mean 'learning_rate'"]),
        (missing_folder, ["subjct", "did you mean 'subject'"]),
        (empty_folder, ["empty", "no picture"]),
        (truncated_jpeg, ["cut.jpg", "truncated"]),
        (text_named_png, ["note.png", "picture"]),
        (caption_in_latin_1, ["0.txt", "UTF-8"]),
        (class_prompt_with_the_rare_token, ["class_prompt", "zib"]),
        (rank_zero, ["adapter.rank", "positive", "0"]),
        (pattern_that_matches_nothing, ["attn7", "match"]),
        (unknown_model, ["model.path", "no/such/model/folder"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_bad_input_is_refused_with_its_place_and_nothing_is_written(
    break_it: Break,
    words: list[str],
    write_recipe: WriteRecipe,
    subject: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = refused(write_recipe(prior={"kind": "none"}), break_it(subject), capsys)
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


def test_output_folder_of_another_run_is_refused_and_left_alone(
    write_recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(prior={"kind": "none"})
    run(dreambooth.main, ["--config", str(recipe)])
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    message = refused(recipe, ["adapter.rank=4"], capsys)
    assert "another run" in message
    assert "adapter.rank is 2 there and 4 here" in message
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
