"""A profile of FSDP2: what it may say, and a message for all else that accelerate would take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import warm
import yaml
from launching import PROFILES

from finetune.config.schema import TrainConfig
from finetune.engines.fsdp_settings import FsdpSettings, asked, settings
from finetune.errors import UserError


def read(monkeypatch: pytest.MonkeyPatch, path: Path, train: dict[str, Any] | None = None) -> FsdpSettings:
    """What a process finds out that accelerate has started with the profile ``path``."""
    for name, value in next(warm.told(["--config_file", str(path)])).items():
        monkeypatch.setenv(name, value)
    assert asked()
    return settings(TrainConfig.model_validate(train or {}))


def edited(folder: Path, values: dict[str, Any], top: dict[str, Any]) -> Path:
    profile = yaml.safe_load((PROFILES / "fsdp2.yaml").read_text())
    path = folder / "profile.yaml"
    path.write_text(yaml.safe_dump({**profile, **top, "fsdp_config": {**profile["fsdp_config"], **values}}))
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [("fsdp2", FsdpSettings(reshard=True, offload=False)), ("fsdp2-offload", FsdpSettings(reshard=True, offload=True))],
)
def test_the_shipped_profiles_say_what_they_are_called(
    name: str, expected: FsdpSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read(monkeypatch, PROFILES / f"{name}.yaml") == expected


def test_weights_may_stay_between_forward_and_backward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = edited(tmp_path, {"fsdp_reshard_after_forward": False, "fsdp_auto_wrap_policy": "NO_WRAP"}, {})
    assert read(monkeypatch, path) == FsdpSettings(reshard=False)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("fsdp_version", 1, "expected 2"),
        ("fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "block by block"),
        ("fsdp_transformer_layer_cls_to_wrap", "Flux2TransformerBlock", "block by block"),
        ("fsdp_ignored_modules", "x_embedder", "is dealt out"),
        ("fsdp_state_dict_type", "SHARDED_STATE_DICT", "every profile reads"),
        ("fsdp_sharding_strategy", "HYBRID_SHARD", "fsdp_reshard_after_forward instead"),
        ("fsdp_reshard_after_forward", "FULL_SHARD", "true or false"),
        ("fsdp_backward_prefetch", "BACKWARD_PRE", "no such setting"),
        ("fsdp_forward_prefetch", True, "no such setting"),
        ("fsdp_activation_checkpointing", True, "train.gradient_checkpointing"),
        ("fsdp_activation_checkpointing_offload", True, "not done here"),
        ("fsdp_cpu_ram_efficient_loading", True, "every process loads"),
    ],
)
def test_what_is_not_done_is_refused_by_its_name(
    key: str, value: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=rf"{key}.*{words}"):
        read(monkeypatch, edited(tmp_path, {key: value}, {}))


def test_neither_compilers_nor_other_ways_to_cut_pass_silently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="dynamo_backend: INDUCTOR"):
        read(monkeypatch, edited(tmp_path, {}, {"dynamo_config": {"dynamo_backend": "INDUCTOR"}}))
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    with pytest.raises(UserError, match="parallelism_config: true"):
        read(monkeypatch, edited(tmp_path, {}, {}))


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"optimizer": {"name": "muon"}}, "train.optimizer.name: muon does not work with FSDP2.*adamw, lion, sgd"),
        ({"mixed_precision": "fp16"}, "train.mixed_precision: fp16 does not work with FSDP2"),
    ],
)
def test_what_looks_at_weights_as_a_whole_is_refused(
    train: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=words):
        read(monkeypatch, PROFILES / "fsdp2.yaml", train)
