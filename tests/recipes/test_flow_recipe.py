"""DreamBooth on the shipped flow-matching model, from its recipe to files that diffusers reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.config import read_recipe
from finetune.export import identify
from finetune.export.sample import sample
from finetune.publish.card import Card
from finetune.publish.gather import gather
from recipes import dreambooth

RECIPE = Path(__file__).parents[2] / "recipes" / "configs" / "dreambooth-flow-tiny.yaml"
FAST = (
    *(
        "train.steps=2",
        "train.schedule.warmup_steps=0",
        "train.batch_size=1",
        "samples.every=null",
        "export.formats=[diffusers]",
    ),
    *("prior={kind: images, count: 2, sampler: {steps: 1, guidance: 2.0}}",),
    *("report.prompts=['a fep heart at night']", "report.per_prompt=1", "report.sampler.steps=1"),
)


@pytest.mark.base
def test_the_recipe_runs_to_a_file_that_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "user"))
    run = tmp_path / "run"
    changes = (f"output={run}", f"data.cache.folder={tmp_path / 'cache'}", *FAST)
    dreambooth.main(read_recipe(RECIPE, changes))  # ends with diffusers loading what was written
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert "tinyworld.pipeline(" in (run / "report.html").read_text()
    header = identify(run / "adapters" / "pytorch_lora_weights.safetensors").metadata
    assert header["modelspec.trigger_phrase"] == "fep heart", "the subject's own words, which no recipe names"
    assert "pipeline = tinyworld.pipeline('tinyworld-flow')" in str(Card.of(gather(run), "me/fep"))
    pictures = sample(run / "adapters" / "pytorch_lora_weights.safetensors", ["a fep heart"])
    assert pictures[0].size == (64, 64)
