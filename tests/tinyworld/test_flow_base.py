"""The flow-matching base: a folder like any other, put together from what is shipped, and good enough."""

from __future__ import annotations

import json
import tomllib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune import tinyworld
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import load_family
from finetune.tinyworld import BASE, FLOW, Judge, flow_base, gates
from finetune.tinyworld.training import data, export, flow, latents, prompts, unet

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    made = tmp_path_factory.mktemp("flow") / "model"
    made.mkdir()
    flow_base.write(made, FLOW)
    return made


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    loaded = export.load(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_the_folder_is_an_ordinary_pipeline_of_the_other_base_s_parts(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    base = export.load(BASE)
    assert {found.transformer.dtype, found.vae.dtype, found.text_encoder.dtype} == {torch.float32}
    ids = base.tokenizer(["a red star at night"], padding="max_length", return_tensors="pt").input_ids
    for mine in (found.text_encoder, found.text_encoder_2):
        assert torch.equal(mine(ids).last_hidden_state, base.text_encoder(ids).last_hidden_state)
    for name, weight in found.vae.state_dict().items():
        assert torch.equal(weight, base.vae.state_dict()[name])


def test_it_is_put_together_once_and_again_when_its_parts_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    first = tinyworld.base("tinyworld-flow")
    assert first.is_relative_to(tmp_path)
    index = first / "model_index.json"
    written = index.stat().st_mtime_ns
    assert tinyworld.base("tinyworld-flow") == first and index.stat().st_mtime_ns == written
    monkeypatch.setattr(flow_base, "_digest", lambda: "other")
    assert tinyworld.base("tinyworld-flow") != first
    assert not [left for left in first.parent.iterdir() if "tmp" in left.name or "partial" in left.name]


def test_names_of_shipped_models() -> None:
    assert tinyworld.base("tinyworld") == BASE
    with pytest.raises(UserError, match="did you mean 'tinyworld-flow'"):
        tinyworld.base("tinyworld-flows")


def test_a_wheel_holds_it() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["finetune"]
    held = {path for pattern in listed for path in (ROOT / "finetune").glob(pattern)}
    own = {path for path in FLOW.rglob("*") if path.is_file()}
    assert {path.name for path in own} >= {"model_index.json", "README.md", "scheduler_config.json"} and own <= held


def test_the_family_asks_what_the_pipeline_asks(folder: Path, pipeline: Any) -> None:
    family = load_family(ModelConfig(path=str(folder)))
    family.require("denoiser", "text_encoder", "text_encoder_2")
    assert family.name == "sd3"
    read = family.encode_prompt(["a large striped red star on grass"])
    tokens, _, pooled, _ = pipeline.encode_prompt(
        "a large striped red star on grass", None, None, do_classifier_free_guidance=False
    )
    assert torch.equal(read.tokens, tokens) and read.pooled is not None and torch.equal(read.pooled, pooled)
    noisy, times = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([600.0])
    published = pipeline.transformer(noisy, tokens, pooled, times, return_dict=False)[0]
    with torch.no_grad():
        assert torch.equal(family.predict(noisy, times, read, torch.zeros(1, 6)), published)
        # training's shorter way round the zeros of the absent T5
        states, answer = tokens[:, :24, :128], pooled[:, :64]
        torch.testing.assert_close(
            flow.answer(pipeline.transformer, noisy, times, states, answer), published, atol=1e-5, rtol=1e-4
        )


def test_a_last_token_that_counts_thrice_is_three_tokens() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 8) for _ in range(3))
    thrice = [torch.cat([each, each[:, :, -1:], each[:, :, -1:]], 2) for each in (key, value)]
    attend = nn.functional.scaled_dot_product_attention
    with flow.Counted(5, 3):
        counted = attend(query, key, value)
    torch.testing.assert_close(counted, attend(query, *thrice))


def test_velocity_loss_is_zero_for_the_true_velocity_only() -> None:
    clean = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(2))

    class Knows(nn.Module):
        def __init__(self, share: float) -> None:
            super().__init__()
            self.share = share

        def forward(self, noisy: Tensor, context: Tensor, pooled: Tensor, times: Tensor, return_dict: bool) -> Any:
            sigma = times[:, None, None, None] / 1000
            return (self.share * (noisy - clean) / sigma,)  # noise - clean

    states, pooled = torch.zeros(4, 24, 128), torch.zeros(4, 64)
    losses = [
        flow.velocity_loss(Knows(share), clean, states, pooled, torch.Generator().manual_seed(3))
        for share in (1.0, 0.5)
    ]
    assert losses[0] < 1e-6 < losses[1]


def test_an_untrained_denoiser_answers_nothing_and_its_blocks_change_nothing() -> None:
    torch.manual_seed(0)
    network = flow.build()
    with torch.no_grad():
        found = flow.answer(
            network, torch.randn(2, 4, 16, 16), torch.full((2,), 500.0), torch.randn(2, 24, 128), torch.randn(2, 64)
        )
    assert not found.any()
    assert not network.transformer_blocks[0].norm1.linear.weight.any()


def test_stages_from_scenes_to_a_shipped_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SCENES", (1, 12))
    scenes = data.training_scenes(tmp_path / "data")
    prompts.encode(tmp_path / "flow-prompts")
    states, pooled = prompts.load(tmp_path / "flow-prompts")
    assert states.shape == (12 * prompts.WORDINGS, 24, 128) and pooled.shape == (12 * prompts.WORDINGS, 64)
    text, words = flow_base.text_encoder(), tinyworld.pipeline("tinyworld").tokenizer
    ids = words([unet.caption_for(scenes, 3, 2)], padding="max_length", return_tensors="pt").input_ids
    expected = text(ids, output_hidden_states=True).hidden_states[-2][0]
    torch.testing.assert_close(states[3 * prompts.WORDINGS + 2].float(), expected, atol=2e-2, rtol=1e-3)

    noise = np.random.default_rng(0).standard_normal((2, 12, 4, 16, 16), dtype=np.float32)
    stored = dict(zip(("mean", "logvar"), map(torch.from_numpy, noise), strict=True))
    (tmp_path / "flow-latents").mkdir()
    save_file({**stored, "scale": torch.ones(1)}, tmp_path / "flow-latents" / "latents.safetensors")
    flow.train(tmp_path / "flow", 3, 4, 0)
    export.save_flow(tmp_path / "flow" / "model", tmp_path / "own")
    whole = tmp_path / "whole"
    whole.mkdir()
    flow_base.write(whole, tmp_path / "own")
    trained: Any = SD3Transformer2DModel.from_pretrained(tmp_path / "flow" / "model")
    shipped = export.load(whole).transformer.state_dict()
    for name, weight in latents.rounded(trained).state_dict().items():
        assert torch.equal(shipped[name], weight)
    assert set(json.loads((tmp_path / "own" / "model_index.json").read_text())) >= {"transformer", "text_encoder_3"}


@pytest.mark.base
def test_it_draws_what_a_few_captions_say(pipeline: Any) -> None:
    assert gates.base_accuracy(pipeline, Judge.load(), 16)["all"] > 0.75


@pytest.mark.base
@pytest.mark.slow
def test_it_draws_what_200_captions_say(pipeline: Any) -> None:
    found = gates.base_accuracy(pipeline, Judge.load(), 200)
    assert found["all"] >= 0.85
    assert min(found[name] for name in ("colour", "background", "position")) >= 0.95
