"""The page, with a stand-in for Gradio that notes what is made and what a click calls."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from finetune import cli
from finetune.demo.columns import Settings
from finetune.demo.page import gradio, page
from finetune.errors import UserError


class Part:
    """Any block of a page."""

    def __init__(self, log: list[Part], kind: str, *values: Any, **options: Any) -> None:
        self.kind, self.values, self.options, self.clicked = kind, values, options, {}
        log.append(self)

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *_: object) -> None: ...

    def click(self, function: Any, **options: Any) -> None:
        self.clicked = {"function": function, **options}

    def launch(self, **options: Any) -> None:
        self.launched = options


class Gradio:
    """Has a part of every name."""

    Error = type("Error", (Exception,), {})

    def __init__(self) -> None:
        self.parts: list[Part] = []

    def __getattr__(self, kind: str) -> Any:
        return lambda *values, **options: Part(self.parts, kind, *values, **options)

    def labelled(self, label: str) -> Part:
        return next(part for part in self.parts if part.options.get("label") == label)

    @property
    def clicked(self) -> dict[str, Any]:
        return next(part.clicked for part in self.parts if part.kind == "Button")


class Shown:
    """In the place of ``Columns``: notes what is asked."""

    title, prompt, strengths = "zib", "a photo of zib star", (0.0, 0.5, 1.0)

    def __init__(self) -> None:
        self.asked: list[tuple[str, Settings]] = []

    def __call__(self, prompt: str, settings: Settings) -> Iterator[tuple[float, Image.Image]]:
        self.asked.append((prompt, settings))
        for strength in settings.strengths:
            if strength > 1:
                raise UserError("no such strength")
            yield strength, Image.new("RGB", (2, 2))


def test_what_is_filled_in():
    gr = Gradio()
    page(gr, Shown())
    values = {name: gr.labelled(name).options["value"] for name in ("Prompt", "Negative prompt", "Strengths", "Seed")}
    assert values == {
        "Prompt": "a photo of zib star",
        "Negative prompt": "",
        "Strengths": "0,0.5,1",
        "Seed": 0,
    }
    names = [part.options["label"] for part in gr.clicked["inputs"]]
    assert names == ["Prompt", "Negative prompt", "Seed", "Steps", "Guidance", "Strengths"]
    assert gr.clicked["outputs"].kind == "Gallery" and gr.clicked["outputs"].options["columns"] == 3
    page(gr := Gradio(), Shown(), "0,1")
    assert gr.labelled("Strengths").options["value"] == "0,1"


def test_a_click_draws_one_column_after_the_other():
    gr, shown_by = Gradio(), Shown()
    page(gr, shown_by)
    shown = [[caption for _, caption in one] for one in gr.clicked["function"]("p", " n ", 7.0, 3.0, 4.5, "0, 0.5")]
    assert shown[0] == ["strength 0"] and shown[-1] == ["strength 0", "strength 0.5"]
    ((prompt, settings),) = shown_by.asked
    assert (prompt, settings.negative, settings.seed, settings.strengths) == ("p", "n", 7, (0.0, 0.5))
    assert (settings.sampler.steps, settings.sampler.guidance) == (3, 4.5)


@pytest.mark.parametrize(("strengths", "words"), [("2", "no such strength"), ("0;1", "expected numbers with commas")])
def test_mistakes_are_shown_on_the_page(strengths, words):
    gr = Gradio()
    page(gr, Shown())
    with pytest.raises(Gradio.Error, match=words):
        list(gr.clicked["function"]("p", "", 0, 1, 1.0, strengths))


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install 'finetune\[demo\]'"):
        gradio()
    monkeypatch.setattr(sys, "argv", ["finetune", "demo", str(tmp_path / "none.safetensors")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "finetune demo needs Gradio" in capsys.readouterr().err


def test_the_command_opens_it_on_this_machine_alone(monkeypatch, exported):
    gr = Gradio()
    monkeypatch.setitem(sys.modules, "gradio", gr)
    monkeypatch.setattr(
        sys, "argv", ["finetune", "demo", str(exported("lora")), "--port", "7000", "--strengths", "0,1"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    blocks = next(part for part in gr.parts if part.kind == "Blocks")
    assert blocks.launched == {"server_name": "127.0.0.1", "server_port": 7000}
    assert gr.labelled("Prompt").options["value"] == "a photo of <zib> star"
