"""How a run under ZeRO begins: what the launcher was told, and what of it is the recipe's to say."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import DeepSpeedPlugin

from finetune.config.schema import TrainConfig
from finetune.engines import build_locks
from finetune.engines.pieces import require_divisible
from finetune.errors import UserError

_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
_RECIPES = {  # settings of DeepSpeed's that a recipe has -> what the recipe calls them
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "fp16": "train.mixed_precision",
    "bf16": "train.mixed_precision",
    "torch_autocast": "train.mixed_precision",
}


def asked() -> bool:
    """Whether the launcher was told to use DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def plugin(train: TrainConfig, on_cpu: bool) -> DeepSpeedPlugin:
    """Accelerate's description of what the launcher was told and what the recipe says.

    Raises:
        UserError: DeepSpeed is not installed, the file of its settings is none, or they contradict the recipe.
    """
    _require_possible(train, on_cpu)
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        comm: Any = importlib.import_module("deepspeed.comm.torch")
    except ImportError:
        raise UserError("the launch profile asks for DeepSpeed: pip install deepspeed") from None
    build_locks.watch()
    comm.build_shm_op = lambda: None  # a kernel for inference on CPUs, which the first start would compile
    if _FILE in os.environ:
        os.environ[_FILE] = str(_settings_file(Path(os.environ[_FILE])))
    found = DeepSpeedPlugin(zero3_init_flag=False)  # networks are loaded whole, then dealt out
    if found.zero_stage not in (1, 2, 3):
        raise UserError(f"DeepSpeed's zero_optimization.stage is {found.zero_stage}, expected 1, 2 or 3; else use ddp")
    found.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": 0.0,  # clipped here, before the step, so that a bad gradient stops the run and not a step
        "zero_force_ds_cpu_optimizer": False,  # the recipe's optimizer, also where its memory is on the host
    }
    return found


def _require_possible(train: TrainConfig, on_cpu: bool) -> None:
    require_divisible(train, "ZeRO")
    if on_cpu and torch.cuda.is_available():
        raise UserError("train.device is 'cpu', but DeepSpeed takes the GPU that is there; set CUDA_VISIBLE_DEVICES=''")


def _settings_file(path: Path) -> Path:
    """DeepSpeed's settings, below the current folder or beside the package, as the profiles that are shipped name it.

    Raises:
        UserError: there is none, or it decides what recipes decide.
    """
    places = [path, Path(__file__).parents[2] / path]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UserError(f"deepspeed_config_file: there is no {path}")
    try:
        settings = json.loads(found.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{found}: is no JSON: {error}") from None
    if not isinstance(settings, dict) or "stage" not in settings.get("zero_optimization", {}):
        raise UserError(f"{found}: there is no zero_optimization.stage in it")
    for key, ours in _RECIPES.items():
        if settings.get(key, "auto") != "auto":
            raise UserError(f'{found}: {key} is the recipe\'s to say, as {ours}; take it out, or write "auto"')
    _require_swapping(found, settings["zero_optimization"])
    return found.resolve()


def _require_swapping(file: Path, settings: Mapping[str, Any]) -> None:
    """What is swapped to a disk must be frozen or have a copy in memory, and needs an operation that is compiled.

    Raises:
        UserError: the optimizer is to be swapped, there is no such folder, or libaio is missing.
    """
    if _device(settings, "offload_optimizer") == "nvme":
        raise UserError(
            f"{file}: offload_optimizer.device is 'nvme', but gradients are clipped and checkpoints written from what "
            "the optimizer holds in memory; take 'cpu' (offload_param may be 'nvme')"
        )
    if _device(settings, "offload_param") != "nvme":
        return
    folder = Path(settings["offload_param"].get("nvme_path") or "")
    if not folder.is_absolute() or not os.access(folder, os.W_OK):
        raise UserError(f"{file}: offload_param.nvme_path is {str(folder)!r}, expected a writable folder of a disk")
    operations: Any = importlib.import_module("deepspeed.ops.op_builder")
    known: Any = importlib.import_module("deepspeed.git_version_info")
    if not known.installed_ops.get("async_io") and not operations.AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            f"{file}: offload_param.device is 'nvme', for which DeepSpeed compiles its operation async_io; that needs "
            "a C++ compiler and libaio with its headers: apt-get install g++ libaio-dev, or CFLAGS and LDFLAGS that "
            "say where libaio is"
        )


def _device(settings: Mapping[str, Any], key: str) -> str:
    return str((settings.get(key) or {}).get("device", "none"))
