"""Runs with another objective: what they write can be sampled as it was trained, and every way to run is the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from finetune.config import read_recipe
from finetune.config.schema import ModelConfig
from finetune.data import prepare
from finetune.denoise import preservation_error, spoil
from finetune.errors import UserError
from finetune.export import identify
from finetune.export.base import load_base
from finetune.families import load_family
from finetune.objectives import EDM
from finetune.plan import plan
from recipes import dreambooth

WriteRecipe = Callable[..., Path]
LORA = Path("adapters") / "pytorch_lora_weights.safetensors"
EVERYTHING = {
    "prediction": "v_prediction",
    "zero_terminal_snr": True,
    "timesteps": {"distribution": {"kind": "mode"}, "min": 0.1, "bias": 0.5, "draws": "stratified"},
    "noise": {"offset": 0.1, "offset_probability": 0.5, "perturbation": 0.1, "pyramid": {"levels": 3}},
    "weighting": {"kind": "min_snr", "least": 0.05},
    "loss": {"kind": "pseudo_huber", "delta": 0.2, "schedule": "snr"},
}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


@pytest.mark.parametrize("kind", ["pairwise", "mixed"])
def test_cached_uncached_and_continued_runs_are_one(kind: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    prior = {"kind": "images", "count": 3, "layout": kind, "sampler": {"steps": 1}}
    adapter = {"kind": "lora", "rank": 2}  # dropout is drawn for a forward pass, and would differ where they do
    recipe = write_recipe(objective=EVERYTHING, prior=prior, adapter=adapter)

    def run(name: str, *changes: str) -> Path:
        dreambooth.main(read_recipe(recipe, [f"output={tmp_path / name}", *changes]))
        return tmp_path / name

    whole = run("whole", "train.steps=6")
    again = run("again", "train.steps=6", "data.cache.latents=false", "data.cache.text=false")
    divided = run("divided", "train.steps=6", "train.batch_size=1", "train.gradient_accumulation_steps=2")
    run("parts", "train.steps=2")
    parts = run("parts", "train.steps=6")
    assert len(losses(whole)) == 6 and losses(whole) == losses(again)
    assert (whole / LORA).read_bytes() == (parts / LORA).read_bytes()
    assert losses(divided) == pytest.approx(losses(whole), rel=1e-4)


def test_a_lora_says_how_it_was_trained_and_is_sampled_so(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    dreambooth.main(read_recipe(write_recipe(objective=EVERYTHING, prior={"kind": "none"})))
    header = identify(tmp_path / "run" / LORA).metadata
    assert json.loads(header["finetune.scheduler"]) == ZERO_SNR
    assert json.loads(header["finetune.objective"])["noise"]["perturbation"] == 0.1
    assert header["modelspec.prediction_type"] == "v"
    family = load_base(identify(tmp_path / "run" / LORA))
    scheduler: Any = family.pipeline().scheduler
    assert {name: scheduler.config[name] for name in ZERO_SNR} == ZERO_SNR
    [kohya] = (tmp_path / "run" / "adapters").glob("run.safetensors")
    fields = {key: value for key, value in identify(kohya).metadata.items() if key.startswith("ss_")}
    expected = {
        "ss_min_snr_gamma": "5.0",
        "ss_zero_terminal_snr": "True",
        "ss_noise_offset": "0.1",
        "ss_ip_noise_gamma": "0.1",
        "ss_multires_noise_iterations": "3",
        "ss_multires_noise_discount": "0.3",
        "ss_loss_type": "huber",
        "ss_huber_schedule": "snr",
        "ss_huber_c": "0.2",
    }
    assert expected.items() <= fields.items()


def test_a_run_without_a_section_says_nothing_of_it(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    dreambooth.main(read_recipe(write_recipe(prior={"kind": "none"})))
    header = identify(tmp_path / "run" / LORA).metadata
    assert not {"finetune.objective", "finetune.scheduler"} & header.keys()
    assert header["modelspec.prediction_type"] == "epsilon"


def with_scheduler(base: Path, kind: str) -> None:
    """Have a folder name another class of scheduler."""
    changes = {
        "scheduler/scheduler_config.json": {"_class_name": kind},
        "model_index.json": {"scheduler": ["diffusers", kind]},
    }
    for name, change in changes.items():
        file = base / name
        file.write_text(json.dumps(json.loads(file.read_text()) | change))


def test_a_base_of_edm_trains_and_draws(write_recipe: WriteRecipe, tmp_path: Path, tiny_sd: Path) -> None:
    base = shutil.copytree(tiny_sd, tmp_path / "base")
    with_scheduler(base, "EDMEulerScheduler")
    prior = {"kind": "images", "count": 2, "sampler": {"steps": 2}}
    recipe = read_recipe(write_recipe(model={"path": str(base)}, prior=prior))
    assert isinstance(load_family(recipe.model).process, EDM)
    dreambooth.main(recipe)
    assert all(0 < loss < 10 for loss in losses(tmp_path / "run"))
    with pytest.raises(UserError, match=r"objective\.weighting\.kind: min_snr .*EDM"):
        plan(read_recipe(write_recipe(model={"path": str(base)}, objective={"weighting": {"kind": "min_snr"}})))


@pytest.mark.parametrize("kind", ["DDIMScheduler", "PNDMScheduler"])
def test_a_model_folder_carries_the_scheduler(
    kind: str, write_recipe: WriteRecipe, tmp_path: Path, tiny_sd: Path
) -> None:
    base = shutil.copytree(tiny_sd, tmp_path / "base")
    with_scheduler(base, kind)
    objective = {"prediction": "v_prediction", "zero_terminal_snr": True}
    sections = {"adapter": {"kind": "full", "select": "all"}, "model": {"path": str(base)}, "objective": objective}
    dreambooth.main(read_recipe(write_recipe(prior={"kind": "none"}, **sections)))
    model = tmp_path / "run" / "adapters" / "model"
    scheduler = StableDiffusionPipeline.from_pretrained(model, safety_checker=None).scheduler
    assert type(scheduler).__name__ == "DDIMScheduler"
    assert {name: scheduler.config[name] for name in ZERO_SNR} == ZERO_SNR
    assert not scheduler.config.clip_sample
    assert scheduler.alphas_cumprod[-1] == 0
    continued = load_family(ModelConfig(path=str(model)))
    assert continued.process.prediction == "v_prediction"


def test_class_images_are_drawn_as_the_untouched_model_draws(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    plain, changed = (
        read_recipe(write_recipe(objective=objective), [f"data.cache.folder={tmp_path / name}"])
        for name, objective in (("plain", {}), ("changed", EVERYTHING))
    )
    drawn = []
    for recipe in (plain, changed):
        family = load_family(recipe.model, recipe.objective)
        drawn.append([picture.path.read_bytes() for picture in prepare(recipe, family).classes])
        assert family.sampling == family.objective.sampling
    assert drawn[0] == drawn[1]


def test_a_prior_by_the_model_is_restated_in_another_prediction(write_recipe: WriteRecipe) -> None:
    """Before the first step the adapter changes nothing, so what is left is how far v is from the base's epsilon."""
    recipe = read_recipe(write_recipe(objective={"prediction": "v_prediction"}, prior={"kind": "model"}))
    family = load_family(recipe.model, recipe.objective)
    batches = prepare(recipe, family)
    from finetune.adapters import attach

    adapter = attach(recipe.adapter, family, recipe.seed)
    family.networks.eval()
    batch = batches.batch(0)
    noised = spoil(family, batch, recipe.seed)
    with torch.no_grad():
        prompt = batch.class_prompt
        assert prompt is not None
        answer = family.predict(noised.noisy, noised.timesteps, prompt, batch.geometry)
        expected = (answer - family.objective.restate(answer, noised)).square().flatten(1).mean(1)
        found = preservation_error(family, adapter, batch, recipe.seed)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found > 0.01).all()


def test_a_concepts_own_bias_takes_the_place_of_the_runs(write_recipe: WriteRecipe, subject: Path) -> None:
    concept = {"folder": str(subject), "prompt": "a zib star", "class_prompt": "a star", "trigger": "zib"}
    data = {"resolution": 16, "concepts": [concept, concept | {"timestep_bias": -1.0}], "cache": {"latents": False}}
    recipe = read_recipe(write_recipe(data=data, objective={"timesteps": {"bias": 2.0}}, prior={"kind": "none"}))
    family = load_family(recipe.model, recipe.objective)
    batches = prepare(recipe, family)
    seen = set()
    for step in range(6):
        batch = batches.batch(step)
        assert batch.timestep_bias is not None
        seen |= {(name[0], bias) for name, bias in zip(batch.ids, batch.timestep_bias.tolist(), strict=True)}
    assert seen == {("0", 2.0), ("1", -1.0)}
    plain = read_recipe(write_recipe(prior={"kind": "none"}))
    assert prepare(plain, load_family(plain.model)).batch(0).timestep_bias is None


def test_a_plan_notes_a_last_timestep_without_weight(write_recipe: WriteRecipe, tiny_sd_v: Path) -> None:
    objective: dict[str, Any] = {"zero_terminal_snr": True, "weighting": {"kind": "min_snr"}}
    recipe = write_recipe(objective=objective, model={"path": str(tiny_sd_v)})
    assert any("last timestep" in note for note in plan(read_recipe(recipe)).notes)
    assert not any(
        "last timestep" in note for note in plan(read_recipe(recipe, ["objective.weighting.least=0.1"])).notes
    )
