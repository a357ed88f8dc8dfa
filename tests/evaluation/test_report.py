"""The report holds what it should, leaves out what is missing, and trusts nothing that it is given."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from math import nan
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.evaluation.charts import nice_ceiling, smoothed, ticks
from finetune.evaluation.markup import escape, tag
from finetune.evaluation.protocol import Evaluation, Figures
from finetune.evaluation.report import (
    Captioned,
    Check,
    Command,
    ExportedFile,
    ReportData,
    Shot,
    Snapshot,
    read_metrics,
    write_report,
)
from finetune.evaluation.verdict import verdict

ATTACK = '<script>alert("x")</script>'
SECTIONS = {"subject", "scenes", "class", "judge", "loss", "samples", "class-images", "files", "use", "details"}


class Page(HTMLParser):
    """What a browser would see."""

    VOID = frozenset({"img", "meta", "br", "link", "input", "path", "line"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((name, dict(attributes)))
        if name not in self.VOID:
            self.open.append(name)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((name, dict(attributes)))

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.words += data

    def sections(self) -> set[str | None]:
        return {attributes["id"] for name, attributes in self.tags if name == "section"}


def noise(seed: int, side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def figures(normalised: float, accuracy: float = 0.95, pres: float = 0.05) -> Figures:
    parts = {"shape": 1.0, "background": accuracy, "position": accuracy}
    return Figures(0.6 * normalised, normalised, normalised, accuracy, parts, pres, 0.7)


def evaluation(after: Figures | None = None) -> Evaluation:
    return Evaluation(7, 0.02, 0.62, 0.99, 0.95, figures(0.03), after or figures(0.8))


def full() -> ReportData:
    row = [noise(1), noise(2)]
    return ReportData(
        title="zib star",
        kind="DreamBooth",
        triggers=("zib",),
        subject=[Captioned(noise(3), "a zib star")],
        scenes=[Shot("a zib star on snow", row, row)],
        instance=Shot("a zib star", row, row),
        of_class=Shot("a star", row, row),
        class_images=[Captioned(noise(4), "a star")],
        class_image_count=64,
        evaluation=evaluation(),
        metrics=[{"step": n, "loss": 2 / n, "loss_instance": 1 / n, "loss_prior": 1 / n} for n in range(1, 30)],
        snapshots=[Snapshot(10, "a zib star", [noise(5)])],
        exported=[
            ExportedFile("adapters/zib.safetensors", "diffusers", 1_500_000, [Check("no NaN", True, "128 tensors")])
        ],
        commands=[Command("From diffusers", "pipeline.load_lora_weights('zib.safetensors')")],
        recipe="recipe: dreambooth\n",
        facts={"torch": "2.13.0"},
        notes=["1 picture was dropped: empty.png is empty"],
        seconds=200,
        training_seconds=120,
        peak_memory=2_000_000_000,
    )


def written(data: ReportData, folder: Path) -> Page:
    return Page(write_report(folder, data).read_text(encoding="utf-8"))


def test_every_section_is_there_and_every_tag_is_closed(tmp_path: Path) -> None:
    page = written(full(), tmp_path)
    assert page.sections() == SECTIONS
    assert page.open == []
    for words in ("zib star on snow", "3 min 20 s", "2.00 GB", "80 %", "no NaN", "recipe: dreambooth", "2.13.0", "64"):
        assert words in page.words, words


def test_parts_that_are_missing_are_left_out(tmp_path: Path) -> None:
    page = written(ReportData(title="nothing yet"), tmp_path)
    assert page.sections() == set()
    assert "nothing yet" in page.words


def test_a_real_subject_is_told_why_there_are_no_figures(tmp_path: Path) -> None:
    page = written(replace(full(), evaluation=None), tmp_path)
    assert "no opinion on photographs" in page.words
    assert "subject fidelity" not in page.words


def test_measures_that_were_not_taken_are_not_shown(tmp_path: Path) -> None:
    nothing = replace(figures(0.8), accuracy=nan, accuracies={}, pres=nan, div=nan)
    page = written(replace(full(), evaluation=replace(evaluation(nothing), before=nothing)), tmp_path)
    assert sum(attributes.get("class") == "measure" for _, attributes in page.tags) == 1
    assert "nan" not in page.words


def test_without_a_prior_there_are_neither_class_images_nor_a_second_curve(tmp_path: Path) -> None:
    metrics = [{"step": n, "loss": 1 / n, "loss_instance": 1 / n, "loss_prior": 0.0} for n in range(1, 30)]
    page = written(replace(full(), class_images=(), metrics=metrics), tmp_path)
    assert page.sections() == SECTIONS - {"class-images"}
    assert sum(name == "path" for name, _ in page.tags) == 2  # one curve: as measured and smoothed


def test_what_users_wrote_is_text_and_never_html(tmp_path: Path) -> None:
    data = replace(
        full(),
        title=ATTACK,
        kind=ATTACK,
        triggers=("zib",),
        subject=[Captioned(noise(3), ATTACK + '" onerror="alert(1)')],
        scenes=[Shot(f"a zib {ATTACK}", [noise(1)], [noise(1)])],
        exported=[ExportedFile(ATTACK, ATTACK, 1, [Check(ATTACK, False, ATTACK)])],
        commands=[Command(ATTACK, ATTACK)],
        recipe=f"output: {ATTACK}",
        facts={ATTACK: ATTACK},
        notes=[ATTACK],
    )
    page = written(data, tmp_path)
    assert sum(name == "script" for name, _ in page.tags) == 1  # the page's own
    assert not [value for _, attributes in page.tags for value in attributes if value.startswith("on")]
    assert page.words.count(ATTACK) >= 10


def test_the_page_asks_no_server_for_anything(tmp_path: Path) -> None:
    text = write_report(tmp_path, full()).read_text(encoding="utf-8")
    for name, attributes in Page(text).tags:
        for key in ("src", "href", "srcset", "data", "poster"):
            value = attributes.get(key) or ""
            assert value.startswith(("data:image/", "#")) or not value, (name, value[:60])
    assert not re.search(r"@import|url\(", text)
    assert "default-src 'none'" in text


def test_small_pictures_keep_their_pixels_and_large_ones_are_scaled_down(tmp_path: Path) -> None:
    photographs = [Captioned(noise(seed, 1024), "a dog") for seed in range(5)]
    path = write_report(tmp_path, replace(full(), subject=photographs))
    assert path.stat().st_size < 1_500_000
    crisp = {
        (attributes["src"] or "")[:15]
        for name, attributes in Page(path.read_text()).tags
        if attributes.get("class") == "crisp"
    }
    assert crisp == {"data:image/png;"}


def test_a_whole_run_stays_a_page_that_can_be_sent(tmp_path: Path) -> None:
    scenes = [Shot(f"scene {n}", [noise(n)] * 4, [noise(n + 99)] * 4) for n in range(10)]
    class_images = [Captioned(noise(n), "a star") for n in range(300)]
    assert write_report(tmp_path, replace(full(), scenes=scenes, class_images=class_images)).stat().st_size < 4_000_000


def test_the_page_does_not_say_where_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = replace(full(), recipe=f"output: {tmp_path}/runs/a", commands=[Command("look", f"ls {Path.home()}/x")])
    text = write_report(tmp_path / "runs", data).read_text(encoding="utf-8")
    assert str(tmp_path) not in text and f"{Path.home()}/" not in text
    assert "output: ./runs/a" in text and "ls ~/x" in text


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    first = write_report(tmp_path / "a", full()).read_bytes()
    assert first == write_report(tmp_path / "b", full()).read_bytes()


@pytest.mark.parametrize(
    ("after", "grade", "words"),
    [
        (figures(0.8), "good", "still draws other crosses"),
        (figures(0.8, pres=0.5), "mixed", "other crosses now look like it"),
        (figures(0.8, accuracy=0.6), "mixed", "follows the rest of a prompt less well"),
        (figures(0.8, accuracy=0.6, pres=0.5), "mixed", "other crosses now look like it"),
        (figures(0.3), "mixed", "a part of"),
        (figures(0.05), "bad", "has not learnt"),
    ],
)
def test_the_verdict_says_what_the_figures_say(after: Figures, grade: str, words: str) -> None:
    found = verdict(evaluation(after), "zib cross", "cross")
    assert found.grade == grade
    assert words in found.text


def test_only_markup_is_left_as_it_is() -> None:
    assert tag("p", "<b>", tag("i", "&"), class_='"') == '<p class="&quot;">&lt;b&gt;<i>&amp;</i></p>'
    assert escape(escape("<")) == "&lt;"


def test_metrics_of_a_run_that_was_cut_short_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "note": "saved"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.0}]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant() -> None:
    assert smoothed([5.0] * 40) == pytest.approx([5.0] * 40)
    assert smoothed([3.0, 1.0, 1.0], width=2)[0] == 3.0
    assert smoothed([1.0, float("nan"), 1.0], width=2)[1] == 1.0


def test_axes_have_round_numbers() -> None:
    assert [nice_ceiling(value) for value in (0.18, 0.2, 1.1, 7.0, 0.0)] == pytest.approx([0.2, 0.2, 1.5, 8.0, 1.0])
    assert ticks(1, 500) == [100, 200, 300, 400, 500]
    assert ticks(1, 3) == [1, 2, 3]
