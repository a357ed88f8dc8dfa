"""From a recipe's model section to a family, and what is said where there is none."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import load_file

from finetune.config.objective import MinSnrWeighting, ObjectiveConfig
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import GROUP, families, load_family, model_folder
from finetune.families.sd import SD
from finetune.families.tiny import write_tiny_sd
from finetune.objectives import DDPM, Denoising


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a folder was looked for on the network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_folder_is_detected_and_needs_no_network(tiny_sd: Path, no_network: None) -> None:
    family = load_family(ModelConfig(path=str(tiny_sd)))
    family.require("denoiser", "vae", "text_encoder")
    family.pipeline()
    assert family.name == "sd"
    assert (family.source, family.folder) == (str(tiny_sd), tiny_sd)


def test_no_weights_are_read_before_they_are_required(tiny_sd: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sd, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    assert len(load_family(ModelConfig(path=str(folder))).networks) == 0


def test_the_embedded_model_has_a_name() -> None:
    assert model_folder(ModelConfig()).parts[-2:] == ("tinyworld", "base")


def test_min_snr_reaches_the_objective(tiny_sd: Path) -> None:
    weighted = load_family(ModelConfig(path=str(tiny_sd)), ObjectiveConfig(weighting=MinSnrWeighting(kind="min_snr")))
    assert isinstance(weighted.objective, Denoising) and isinstance(weighted.process, DDPM)
    times = torch.tensor([100])
    torch.testing.assert_close(weighted.objective.weigh(times), 5 / weighted.process.snr(times))


@pytest.mark.parametrize("missing", ["modle", "modle/deeper"])
def test_a_missing_folder_names_its_neighbour(tmp_path: Path, missing: str) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"model\.path.*did you mean 'model'"):
        load_family(ModelConfig(path=str(tmp_path / missing)))


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model_index\.json"):
        load_family(ModelConfig(path=str(tmp_path)))


def test_an_unknown_architecture_names_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WondrousPipeline"}))
    with pytest.raises(UserError, match=r"'WondrousPipeline'.*StableDiffusionPipeline"):
        load_family(ModelConfig(path=str(tmp_path)))


def test_a_relative_path_into_an_existing_folder_is_no_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(UserError, match="no folder or file 'models/mine'"):
        load_family(ModelConfig(path="models/mine"))


def test_a_hub_name_that_cannot_be_fetched_is_a_users_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    def absent(*_: object, **__: object) -> NoReturn:
        raise OSError("no such repository")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "download", absent)
    with pytest.raises(UserError, match=r"'someone/something'.*no such repository"):
        load_family(ModelConfig(path="someone/something"))


def test_a_hub_model_is_the_folder_it_is_fetched_to(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DiffusionPipeline

    asked: dict[str, object] = {}

    def download(name: str, **options: object) -> str:
        asked.update(name=name, **options)
        return str(tiny_sd)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "download", download)
    family = load_family(ModelConfig(path="someone/something", revision="abc"))
    assert (family.source, family.folder) == ("someone/something", tiny_sd)
    assert asked["revision"] == "abc"
    assert asked["use_safetensors"] is True, "pickles are never opened"


def test_every_family_is_registered_under_its_name() -> None:
    assert all(name == family.name for name, family in families().items())


def test_the_twin_is_small_quick_and_reproducible(tmp_path: Path) -> None:
    write_tiny_sd(tmp_path / "warm")
    state = torch.random.get_rng_state()
    started = time.process_time()
    write_tiny_sd(tmp_path / "one", seed=1)
    assert time.process_time() - started < 2
    assert torch.equal(torch.random.get_rng_state(), state)
    write_tiny_sd(tmp_path / "two", seed=1)
    write_tiny_sd(tmp_path / "other", seed=2)
    one, two, other = (
        load_file(tmp_path / name / "unet/diffusion_pytorch_model.safetensors") for name in ("one", "two", "other")
    )
    assert sum(tensor.numel() for tensor in one.values()) < 300_000
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["conv_in.weight"], other["conv_in.weight"])


def test_a_family_of_another_distribution_is_found(monkeypatch: pytest.MonkeyPatch, editable: Path) -> None:
    """An entry point is all that it takes: no line of this package changes."""

    class Toy(SD):
        name = "toy"
        pipelines = ("ToyPipeline",)

    class Point:
        def load(self) -> type[Toy]:
            return Toy

    monkeypatch.setattr("finetune.families.entry_points", lambda group: [Point()] if group == GROUP else [])
    families.cache_clear()
    try:
        index = editable / "model_index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "ToyPipeline"}))
        assert isinstance(load_family(ModelConfig(path=str(editable))), Toy)
        assert isinstance(load_family(ModelConfig(path=str(editable), family="sd")), SD)
    finally:
        families.cache_clear()
