"""What ``verify`` asks of a LoRA file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from finetune.adapter import Weights
from finetune.errors import GuardError
from finetune.export import kohya
from finetune.export.checks import Report, quiet
from finetune.export.compare import TOLERANCE, answer, close, difference, identical, mapped
from finetune.export.layers import Layer, applied, check, check_learned, check_shape, layers
from finetune.export.metadata import OWN
from finetune.export.names import fuses
from finetune.export.read import Identity, read_tensors
from finetune.export.readers import TOOLS
from finetune.family import ModelFamily

ADAPTER = "verified"


def check_file(
    report: Report, found: Identity, family: ModelFamily, against: Sequence[str], weights: Weights | None
) -> None:
    """Ask everything, the cheapest first; what needs the base model only where the file itself is sound."""
    tensors = read_tensors(found.path)
    names = family.export_names
    report.run("finite", lambda: check(tensors), lambda _: f"{len(tensors)} tensors, none empty, NaN or infinite")
    unpacked = report.run(
        "keys", lambda: found.format.unpack(tensors, names), lambda read: f"all read: {len(read)} layers"
    )
    if unpacked is None or not report.passed:
        return
    report.run("learned", lambda: _learned(unpacked))
    report.run("header", lambda: _header(found, tensors, unpacked, fuses(names)))
    expected = unpacked
    if weights is not None:
        expected = report.run("equal to memory", lambda: _same(found, tensors, family, weights), _count) or unpacked
    if found.layout == "kohya":
        report.run("alpha", lambda: _ranks(unpacked) if fuses(names) else _one_alpha(unpacked))
        report.run("attention", lambda: _whole_attention(unpacked))
    if not report.passed:
        return
    family.require("denoiser", *family.text_encoders)
    networks = {name: family.networks[name] for name in names}
    if report.run("shapes", lambda: _shapes(unpacked, networks)) is None:
        return
    readable = found.format.readers
    for tool in against:
        if tool in TOOLS:
            report.run(tool, lambda tool=tool: mapped(tool, tensors, found, readable, family))  # type: ignore[misc]
    if "diffusers" in against:
        _check_diffusers(report, found, family, expected, TOLERANCE[next(iter(tensors.values())).dtype])


def _learned(unpacked: Sequence[Layer]) -> str:
    for layer in unpacked:
        check_shape(layer)
    check_learned(unpacked)
    largest = max(unpacked, key=lambda layer: float(layer.up.abs().max()) * layer.scale)
    return f"lora_B is not zero; the largest change is in {largest.name}"


def _header(found: Identity, tensors: dict[str, Tensor], unpacked: Sequence[Layer], fused: bool) -> str:
    """What the header promises is there. Files of other tools promise nothing that is checked here.

    Args:
        fused: whether alphas are ranks in files of the family.
    """
    stated, alpha = found.metadata.get(f"{OWN}layers"), found.metadata.get("ss_network_alpha")
    if stated is not None and int(stated) != len(unpacked):
        raise GuardError(f"the header says {stated} layers, the file holds {len(unpacked)}")
    if f"{OWN}layout" in found.metadata and alpha is not None:
        missing = [key for key in tensors if key.endswith(kohya.DOWN) and _alpha_key(key) not in tensors]
        if missing:
            raise GuardError(f"{_alpha_key(missing[0])!r} and {len(missing) - 1} more alphas are missing")
        wrong = [layer for layer in unpacked if not math.isclose(layer.alpha, float(alpha), rel_tol=1e-6)]
        wrong = [layer for layer in wrong if not fused or layer.scale != 1.0]
        if wrong:
            raise GuardError(f"{wrong[0].name} has alpha {wrong[0].alpha}, the header says {alpha}")
    return f"base {found.base or 'not named'}, {stated or 'unstated'} layers"


def _alpha_key(down: str) -> str:
    return down.removesuffix(kohya.DOWN) + kohya.ALPHA


def _same(found: Identity, tensors: dict[str, Tensor], family: ModelFamily, weights: Weights) -> list[Layer]:
    """Every tensor of the file is, bit for bit, what these weights are written as. Returns the weights' layers."""
    expected = layers(weights)
    wanted = found.format.pack(expected, family.export_names, next(iter(tensors.values())).dtype)
    identical(tensors, wanted)
    return expected


def _count(found: Sequence[Layer]) -> str:
    return f"bit for bit, {len(found)} layers"


def _one_alpha(unpacked: Sequence[Layer]) -> str:
    alphas = sorted({layer.alpha for layer in unpacked})
    if len(alphas) > 1:
        raise GuardError(f"layers state different alphas ({alphas[0]} to {alphas[-1]}); diffusers would mix them up")
    return f"{alphas[0]:g} in every layer"


def _ranks(unpacked: Sequence[Layer]) -> str:
    """Of families whose files have several of diffusers' layers as one, which is not for diffusers to mix up."""
    scales = sorted({layer.scale for layer in unpacked})
    return (
        f"scales of {scales[0]:g} to {scales[-1]:g}" if len(scales) > 1 else f"a scale of {scales[0]:g} in every layer"
    )


def _whole_attention(unpacked: Sequence[Layer]) -> str:
    if missing := kohya.incomplete(unpacked):
        raise GuardError(f"{min(missing)} is missing beside its siblings; readers that fuse them drop all four")
    return "text encoder projections are complete"


def _shapes(unpacked: Sequence[Layer], networks: dict[str, nn.Module]) -> str:
    for layer in unpacked:
        weight = dict(networks[layer.network].named_parameters()).get(f"{layer.module}.weight")
        if weight is None:
            raise GuardError(f"the base model has no layer {layer.name}")
        if weight.shape != (layer.up.shape[0], *layer.down.shape[1:]):
            change = [layer.up.shape[0], *layer.down.shape[1:]]
            raise GuardError(f"{layer.name} changes a weight {change}, the base model's is {list(weight.shape)}")
    return f"fit the base model's {len(unpacked)} layers"


@torch.no_grad()
def _check_diffusers(
    report: Report, found: Identity, family: ModelFamily, expected: Sequence[Layer], tolerance: float
) -> None:
    """Load the file by diffusers' own loader into a fresh pipeline, and compare with arithmetic of our own."""
    networks = {name: family.networks[name] for name in family.export_names}
    wanted = {0.0: answer(family)}
    for strength in (0.5, 1.0):
        with applied(networks, expected, strength):
            wanted[strength] = answer(family)
    pipeline = family.pipeline()
    loaded = report.run("diffusers: loads", lambda: _load(pipeline, found))
    if loaded is None:
        return
    placed = {
        f"{network}.{path}": module
        for network, model in networks.items()
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A
    }
    if report.run("diffusers: every layer arrives", lambda: _arrived(expected, placed)) is None:
        return
    report.run("diffusers: merged weights", lambda: _merged(expected, placed, tolerance))
    report.run("diffusers: output", lambda: close(answer(family), wanted[1.0], wanted[0.0], tolerance))
    whole = {name: module.get_delta_weight(ADAPTER) for name, module in placed.items()}
    pipeline.set_adapters([ADAPTER], [0.5])
    report.run("diffusers: half strength", lambda: _halved(whole, placed))
    report.run("diffusers: output at half", lambda: close(answer(family), wanted[0.5], wanted[0.0], tolerance))


def _load(pipeline: Any, found: Identity) -> str:
    with quiet():  # what it warns of is checked next
        pipeline.load_lora_weights(str(found.path), adapter_name=ADAPTER)
    return f"{type(pipeline).__name__}.load_lora_weights"


def _arrived(expected: Sequence[Layer], placed: dict[str, LoraLayer]) -> str:
    wanted = {layer.name for layer in expected}
    if missing := wanted - placed.keys():
        raise GuardError(f"{len(missing)} of {len(wanted)} layers got nothing, for example {min(missing)}")
    for layer in expected:
        if (layer.magnitude is not None) != (ADAPTER in placed[layer.name].lora_magnitude_vector):
            raise GuardError(f"{layer.name} has magnitudes in one place and not in the other")
    extra = [name for name in placed.keys() - wanted if bool(placed[name].lora_B[ADAPTER].weight.any())]
    if extra:
        raise GuardError(f"{len(extra)} layers got weights that are not the adapter's, for example {min(extra)}")
    return f"{len(wanted)} of {len(wanted)}"


def _merged(expected: Sequence[Layer], placed: dict[str, LoraLayer], tolerance: float) -> str:
    worst = 0.0
    for layer in expected:
        delta, merged = layer.delta(), placed[layer.name].get_delta_weight(ADAPTER)
        error = difference(merged, delta)
        if error > tolerance:
            raise GuardError(f"the change of {layer.name} is off by {error:.1e} of its size")
        worst = max(worst, error)
    return "equal bit for bit" if worst == 0.0 else f"equal, largest difference {worst:.1e} of a layer's change"


def _halved(whole: dict[str, Tensor], placed: dict[str, LoraLayer]) -> str:
    for name, module in placed.items():
        if not torch.equal(2 * module.get_delta_weight(ADAPTER), whole[name]):
            raise GuardError(f"at strength 0.5 the change of {name} is not half of that at 1")
    return f"exactly half the change in {len(placed)} layers"
