"""What most tests need: a random Stable Diffusion small enough to make on the spot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import formats
from finetune.adapter import Weights
from finetune.config.schema import ModelConfig
from finetune.export.single_file import write_single_file
from finetune.families import load_family
from finetune.families.tiny import write_tiny_sd
from finetune.family import ModelFamily


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random epsilon-prediction model; for reading only."""
    return write_tiny_sd(tmp_path_factory.mktemp("tiny-sd") / "model")


@pytest.fixture(scope="session")
def tiny_sd_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``tiny_sd``, with v-prediction and SD 2's linear projections; for reading only."""
    path = tmp_path_factory.mktemp("tiny-sd-v") / "model"
    return write_tiny_sd(path, prediction="v_prediction", linear_projection=True)


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of small models of the families with random weights, each written once; for reading only."""
    written: dict[str, Path] = {}

    def twin(name: str) -> Path:
        if name not in written:
            written[name] = formats.twin(name, tmp_path_factory.mktemp(name) / "model")
        return written[name]

    return twin


@pytest.fixture
def tiny_family(tiny_sd: Path) -> ModelFamily:
    """The family of ``tiny_sd``, nothing loaded yet; ``require`` what the test needs."""
    torch.set_num_threads(1)
    return load_family(ModelConfig(path=str(tiny_sd)))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Single files are converted below the test's folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf"


@pytest.fixture
def single_file(tmp_path: Path, own_cache: Path) -> Callable[..., Path]:
    """Write a model folder as a single file that does not say where it is from; one bias of it is moved by 1."""

    def write(
        folder: Path, name: str = "model.safetensors", dtype: torch.dtype = torch.float32, **metadata: str
    ) -> Path:
        family = load_family(ModelConfig(path=str(folder)))
        weights = dict(family.fresh("denoiser").named_parameters())
        bias = next(name for name in weights if name.endswith("bias"))
        moved = Weights("full", {f"denoiser.{bias}": weights[bias] + 1})
        header = {key.replace("__", "."): value for key, value in metadata.items()}
        settings: Mapping[str, Any] = family.scheduler().config  # type: ignore[attr-defined]
        return write_single_file(moved, folder, tmp_path / name, family.export_names, dtype, header, settings)

    return write
