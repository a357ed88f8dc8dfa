"""What most tests need: a random Stable Diffusion small enough to make on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finetune import formats
from finetune.config.schema import ModelConfig
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
