"""The launch profiles that there are, and what of each decides memory and communication."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from finetune.config.command import PROFILES

Kind = Literal["alone", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
NAMES: Mapping[Kind, str] = {
    "alone": "one process",
    "ddp": "DDP",
    "zero1": "DeepSpeed ZeRO-1",
    "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3",
    "fsdp2": "FSDP2",
}
ROOT = Path(__file__).parents[2]  # beside the package, where the launch profiles lie that are shipped
_DEFAULTS = {"reduce_bucket_size": 5 * 10**8, "persistence": 10**5, "reuse": 10**9, "prefetch": 5 * 10**7}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A launch profile.

    Attributes:
        name: of its file.
        kind: which engine runs.
        processes, machines: as the file has them.
        cpu: it never takes a GPU.
        offload_optimizer: the optimizer's memory and its copies of the weights lie on the host.
        offload_weights: so do the pieces of weights.
        bucket: numbers in one of DeepSpeed's buffers for gradients.
        buffers: how many of these there are.
        persistent: ZeRO-3 keeps tensors of up to so many numbers whole.
        reuse: ZeRO-3 keeps a gathered tensor whose next use is less than so many numbers away.
        prefetch: numbers that ZeRO-3 gathers ahead.
        reshard: FSDP2 lets go of a block between its forward and its backward pass.
    """

    name: str
    kind: Kind
    processes: int = 1
    machines: int = 1
    cpu: bool = False
    offload_optimizer: bool = False
    offload_weights: bool = False
    bucket: int = 0
    buffers: int = 0
    persistent: int = 0
    reuse: int = 0
    prefetch: int = 0
    reshard: bool = True

    @property
    def deals_weights(self) -> bool:
        """Whether a process holds a piece of every weight."""
        return self.kind in ("zero3", "fsdp2")


def launches() -> dict[str, Launch]:
    """All that are shipped, or lie below the current folder and are in the same form, by name."""
    files = {file.stem: file for root in (ROOT, Path.cwd()) for file in sorted((root / PROFILES).glob("*.yaml"))}
    found: dict[str, Launch] = {}
    for name, file in sorted(files.items()):
        with suppress(
            LookupError, TypeError, ValueError, OSError, yaml.YAMLError
        ):  # launching it is what finds its faults
            found[name] = read(file)
    return found


def read(file: Path) -> Launch:
    """What a file of accelerate's says.

    Raises:
        LookupError, TypeError, ValueError, OSError, yaml.YAMLError: it is not in the form of those that are shipped.
    """
    said = yaml.safe_load(file.read_text(encoding="utf-8"))
    common: dict[str, Any] = {
        "name": file.stem,
        "processes": said["num_processes"],
        "machines": said["num_machines"],
        "cpu": said["use_cpu"],
    }
    if said["distributed_type"] == "DEEPSPEED":
        return Launch(**common, **_zero(file, said["deepspeed_config"]["deepspeed_config_file"]))
    if said["distributed_type"] == "FSDP":
        told = said["fsdp_config"]
        offload = bool(told.get("fsdp_offload_params", False))
        reshard = bool(told.get("fsdp_reshard_after_forward", True))
        return Launch(**common, kind="fsdp2", offload_optimizer=offload, offload_weights=offload, reshard=reshard)
    return Launch(**common, kind="alone" if said["distributed_type"] == "NO" else "ddp")


def _zero(file: Path, settings: str) -> dict[str, Any]:
    places = [Path(settings), file.parents[2] / settings, ROOT / settings]
    path = next((place for place in places if place.is_file()), places[0])
    told = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]
    stage = told["stage"]
    overlaps = told.get("overlap_comm", stage == 3)
    dealt: dict[str, Any] = {
        "persistent": told.get("stage3_param_persistence_threshold", _DEFAULTS["persistence"]),
        "reuse": told.get("stage3_max_reuse_distance", _DEFAULTS["reuse"]),
        "prefetch": told.get("stage3_prefetch_bucket_size", _DEFAULTS["prefetch"]),
    }
    return {
        "kind": f"zero{stage}",
        "offload_optimizer": told.get("offload_optimizer", {}).get("device") == "cpu",
        "offload_weights": told.get("offload_param", {}).get("device") == "cpu",
        "bucket": told.get("reduce_bucket_size", _DEFAULTS["reduce_bucket_size"]),
        "buffers": 2 if stage < 3 and overlaps else 1,
        **(dealt if stage == 3 else {}),
    }
