"""What ``verify`` asks of a whole model's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.adapter import Weights
from finetune.config.schema import ModelConfig
from finetune.errors import GuardError
from finetune.export.checks import Report, quiet
from finetune.export.full import read_model, weight_files, without
from finetune.export.layers import check
from finetune.export.read import read_header
from finetune.family import ExportNames


def check_folder(report: Report, folder: Path, weights: Weights | None) -> None:
    """Load every part by its own library, compare it with the files and, where given, with what was trained."""
    from finetune.families import load_family

    family = report.run(
        "folder", lambda: load_family(ModelConfig(path=str(folder))), lambda family: f"of family {family.name}"
    )
    if family is None:
        return
    names = family.export_names
    held = report.run("files", lambda: read_model(folder, names), lambda held: f"{len(held.tensors)} tensors")
    if held is None:
        return
    report.run("finite", lambda: check(held.tensors), lambda _: "none empty, NaN or infinite")
    report.run("names", lambda: _prefixed(folder, names))
    if weights is not None:
        report.run("equal to memory", lambda: _same(held, weights))
    networks = report.run(
        "diffusers: loads", lambda: _load(folder, names), lambda _: "DiffusionPipeline.from_pretrained"
    )
    if networks is not None:
        report.run("diffusers: every weight arrives", lambda: _arrived(held, networks))


def _prefixed(folder: Path, names: Mapping[str, ExportNames]) -> str:
    for called in names.values():
        for file in weight_files(folder / called.diffusers):
            keys, metadata = read_header(file)
            short = [key for key in keys if not key.startswith(called.missing_level)]
            if short:
                raise GuardError(f"{file}: {short[0]!r} lacks {called.missing_level!r}; older loaders miss it")
            if metadata.get("format") != "pt":
                raise GuardError(f"{file}: the header lacks format: pt, which transformers asks for")
    return "as older and newer loaders expect them"


def _same(held: Weights, weights: Weights) -> str:
    for name, tensor in weights.tensors.items():
        if name not in held.tensors:
            raise GuardError(f"{name} is missing")
        if not torch.equal(tensor.to(held.tensors[name].dtype), held.tensors[name]):
            raise GuardError(f"{name} differs from what was trained")
    return f"bit for bit, {len(weights.tensors)} trained tensors"


def _load(folder: Path, names: Mapping[str, ExportNames]) -> dict[str, nn.Module]:
    from diffusers import DiffusionPipeline

    absent = dict.fromkeys(without(folder))  # diffusers asks to be told of each, safety checkers aside
    with quiet():
        pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True, **absent)
    return {network: getattr(pipeline, called.diffusers) for network, called in names.items()}


def _arrived(held: Weights, networks: Mapping[str, nn.Module]) -> str:
    there = {
        f"{network}.{key}": value for network, model in networks.items() for key, value in model.state_dict().items()
    }
    there = {name: there[name] for name in _stored(there, held.tensors)}
    if missing := there.keys() - held.tensors.keys():
        raise GuardError(f"{len(missing)} weights are in no file, for example {min(missing)}")
    if extra := held.tensors.keys() - there.keys():
        raise GuardError(f"{len(extra)} tensors of the files were not read, for example {min(extra)}")
    for name, tensor in there.items():
        if not torch.equal(tensor, held.tensors[name].to(tensor.dtype)):
            raise GuardError(f"{name} is loaded with other values than the file's")
    return f"bit for bit, {len(there)} weights"


def _stored(there: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> list[str]:
    """Names of weights without second names of the same ones, which files need not hold."""
    known = {there[name].data_ptr() for name in there.keys() & held.keys()}
    return [name for name, value in there.items() if name in held or value.data_ptr() not in known]
