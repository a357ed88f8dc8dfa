"""Captions of several chunks, chosen from lines, with tags and whole epochs dropped: every way to run is one run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.config import read_recipe
from finetune.config.schema import SamplerConfig
from finetune.export import identify
from finetune.export.sample import adapted, sample
from finetune.plan import plan
from recipes import dreambooth, textual_inversion

WriteRecipe = Callable[..., Path]
LORA = Path("adapters") / "pytorch_lora_weights.safetensors"
LONG = "a photo of zib star, " + "a red ring on grass, " * 9


@pytest.fixture
def lines(tmp_path: Path, tiny_sd: Path) -> dict[str, Any]:
    """The data of a run: captions of one to four chunks, two in a file, and pictures of two shapes."""
    folder = tmp_path / "lines"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (24 + 12 * (number % 2), 24), (40, 50 * number, 90)).save(folder / f"{number}.png")
        tags = "red, blue ring, " * (2 + 6 * number)
        text = f"zib star, {tags}number {number}\n\nzib star\n"
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    concept = {"folder": str(folder), "class_prompt": "a star, " * 12, "trigger": "zib", "caption_lines": "choose"}
    return {
        "strict": True,
        "resolution": 24,
        "buckets": {"step": 8},
        "caption_dropout_every_n_epochs": 2,
        "wording": {
            "shuffle": True,
            "keep_tokens": 1,
            "tag_dropout": 0.4,
            "tag_dropout_mode": "weighted",
            "tag_dropout_except": ["number *"],
        },
        "concepts": [concept | {"prompt": "a zib star"}],
        "cache": {"folder": str(tmp_path / "cache")},
    }


def losses(run: Path) -> list[float]:
    rows = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["loss"] for record in map(json.loads, rows) if "loss" in record]


@pytest.mark.parametrize(("kind", "text_encoder"), [("pairwise", False), ("model", True)])
def test_cached_uncached_and_continued_runs_are_one(
    kind: str, text_encoder: bool, lines: dict[str, Any], write_recipe: WriteRecipe, tiny_sd: Path, tmp_path: Path
) -> None:
    sampler = {"steps": 1}
    prior = {"kind": "images", "count": 4, "layout": kind, "sampler": sampler} if kind != "model" else {"kind": kind}
    adapter = {"kind": "lora", "rank": 2, "dropout": 0.1, "text_encoder": text_encoder}
    model = {"path": str(tiny_sd), "prompt_chunks": 9}
    recipe = write_recipe(data=lines, prior=prior, adapter=adapter, model=model)

    def run(name: str, *changes: str) -> Path:
        dreambooth.main(read_recipe(recipe, [f"output={tmp_path / name}", *changes]))
        return tmp_path / name

    whole = run("whole", "train.steps=5")  # of two pictures: an epoch with captions and one without
    again = run("again", "train.steps=5", "data.cache.latents=false", "data.cache.text=false")
    run("parts", "train.steps=2")
    parts = run("parts", "train.steps=5")
    assert len(losses(whole)) == 5 and losses(whole) == losses(again)
    assert (whole / LORA).read_bytes() == (parts / LORA).read_bytes()


def test_a_file_says_how_long_its_prompts_may_be_and_pictures_show_it(
    write_recipe: WriteRecipe, tiny_sd: Path, tmp_path: Path
) -> None:
    """What is drawn on the way, at the end, and from the file later: all read the whole prompt."""
    samples = {"every": 3, "prompts": [LONG], "sampler": {"steps": 2, "guidance": 2.0}}
    path = write_recipe(model={"path": str(tiny_sd), "prompt_chunks": 6}, samples=samples, prior={"kind": "none"})
    recipe = read_recipe(path)
    dreambooth.main(recipe)
    assert identify(tmp_path / "run" / LORA).prompt_chunks == 6
    assert adapted(tmp_path / "run").prompt_chunks == 6
    asked: dict[str, Any] = {"seed": recipe.seed, "resolution": 16, "sampler": SamplerConfig(steps=2, guidance=2.0)}
    (later,) = sample(tmp_path / "run", [LONG], **asked)
    (cut,) = sample(tmp_path / "run", [LONG], **asked, prompt_chunks=1)
    with Image.open(tmp_path / "run" / "samples" / "step-000003" / "0-0.png") as preview:
        assert np.array_equal(np.asarray(preview), np.asarray(later))
    assert not np.array_equal(np.asarray(cut), np.asarray(later))


def test_words_of_several_vectors_grow_in_long_captions(
    write_recipe: WriteRecipe, subject: Path, tiny_sd: Path, tmp_path: Path
) -> None:
    """A caption may need another chunk when a word in it has grown; a continued run has the same ones."""
    for number in range(3):
        (subject / f"{number}.txt").write_text("a red ring on grass " * 4 + "<zib> star", encoding="utf-8")
    tokens = [{"token": "<zib>", "vectors": 4, "initializer": "star"}]
    path = write_recipe(
        recipe="textual_inversion",
        adapter={"kind": "embedding", "tokens": tokens, "progressive_steps": 1},
        model={"path": str(tiny_sd), "prompt_chunks": 2},
        data={"resolution": 16, "concepts": [{"folder": str(subject), "trigger": "<zib>"}]},
        prior={"kind": "none"},
    )

    def run(name: str, steps: int) -> Path:
        changes = [f"output={tmp_path / name}", f"train.steps={steps}", f"data.cache.folder={tmp_path / 'cache'}"]
        textual_inversion.main(read_recipe(path, changes))
        return tmp_path / name

    whole = run("whole", 6)
    run("parts", 4)
    parts = run("parts", 6)
    assert losses(whole) == losses(parts)
    names = [file.name for file in (whole / "adapters").glob("*.safetensors")]
    assert names and all(
        (whole / "adapters" / name).read_bytes() == (parts / "adapters" / name).read_bytes() for name in names
    )


def test_a_plan_counts_what_long_captions_take(lines: dict[str, Any], write_recipe: WriteRecipe, tiny_sd: Path) -> None:
    path = write_recipe(data=lines, prior={"kind": "none"}, model={"path": str(tiny_sd), "prompt_chunks": 9})
    long, cut = plan(read_recipe(path)), plan(read_recipe(path, ["model.prompt_chunks=1", "data.strict=false"]))
    more, less = (next(cache for cache in one.caches if cache.kind == "captions") for one in (long, cut))
    assert more.entries == less.entries and more.bytes > 2 * less.bytes
    assert less.bytes == less.entries * 24 * 16 * 4
    assert long.memory.total > cut.memory.total
    assert any("too long" in note for note in cut.notes) and not long.notes
