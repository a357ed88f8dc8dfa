"""What ``verify`` asks of a delta: a file with the trained weights alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from finetune.adapter import Weights
from finetune.errors import GuardError
from finetune.export.checks import Report
from finetune.export.compare import answer, close
from finetune.export.delta import load_delta, unpack
from finetune.export.layers import check
from finetune.export.read import Identity, read_tensors
from finetune.family import ModelFamily


def check_file(
    report: Report, found: Identity, family: ModelFamily, against: Sequence[str], weights: Weights | None
) -> None:
    """Ask everything, the cheapest first; the base model is asked only where the file itself is sound."""
    tensors = read_tensors(found.path)
    report.run("finite", lambda: check(tensors), lambda _: f"{len(tensors)} tensors, none empty, NaN or infinite")
    held = report.run("keys", lambda: unpack(tensors, family.export_names), lambda held: f"all read: {len(held)}")
    if held is None or not report.passed:
        return
    if weights is not None:
        report.run("equal to memory", lambda: _same(held, weights))
    for tool in against:
        if tool != "diffusers":
            report.run(tool, lambda tool=tool: _unread(tool))  # type: ignore[misc]
    if report.passed and "diffusers" in against:
        _check_diffusers(report, found, family, held)


def _unread(tool: str) -> str:
    raise GuardError(f"{tool} reads no weights of single layers; write the whole model for it")


def _same(held: Mapping[str, Tensor], weights: Weights) -> str:
    if differing := held.keys() ^ weights.tensors.keys():
        raise GuardError(f"{min(differing)} is in one of file and memory alone")
    for name, tensor in weights.tensors.items():
        if not torch.equal(tensor.to(held[name].dtype), held[name]):
            raise GuardError(f"{name} differs from what was trained")
    return f"bit for bit, {len(held)} trained tensors"


@torch.no_grad()
def _check_diffusers(report: Report, found: Identity, family: ModelFamily, held: Mapping[str, Tensor]) -> None:
    """Put the file into a fresh pipeline, and compare with the base into which the weights were put one by one."""
    family.require("denoiser", *family.text_encoders)
    base = answer(family)
    named = dict(family.networks.named_parameters())
    untouched = {name: named[name].clone() for name in held if name in named}
    if report.run("places", lambda: _fits(held, untouched)) is None:
        return
    for name, tensor in held.items():
        named[name].copy_(tensor)
    wanted = answer(family)
    for name, tensor in untouched.items():
        named[name].copy_(tensor)
    report.run("diffusers: strength 0", lambda: _untouched(family, found, base))
    loaded = report.run(
        "diffusers: loads", lambda: load_delta(family.pipeline(), found.path), lambda count: f"{count} weights"
    )
    if loaded is not None:
        report.run("diffusers: output", lambda: close(answer(family), wanted, base, 0.0))


def _fits(held: Mapping[str, Tensor], untouched: Mapping[str, Tensor]) -> str:
    for name, tensor in held.items():
        if name not in untouched or untouched[name].shape != tensor.shape:
            raise GuardError(f"the base model has no weight {name} of shape {list(tensor.shape)}")
    return f"fit the base model's {len(held)} weights"


def _untouched(family: ModelFamily, found: Identity, base: Tensor) -> str:
    load_delta(family.pipeline(), found.path, 0.0)
    if not torch.equal(answer(family), base):
        raise GuardError("at strength 0 the answer is not the base model's")
    return "the base model's answer, bit for bit"
