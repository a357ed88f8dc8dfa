"""What ``verify`` asks of a hypernetwork's file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from finetune.errors import GuardError
from finetune.export.base import load_base
from finetune.export.checks import Report
from finetune.export.compare import answer, close
from finetune.export.hypernetwork import Stored, comfyui_objection, load_hypernetwork, read
from finetune.export.layers import check
from finetune.export.pickles import check_archive
from finetune.export.read import Identity
from finetune.family import ModelFamily
from finetune.hypernet import Hypernetwork, attach

READERS = {"diffusers": ("diffusers",), "a1111": ("diffusers", "a1111")}


def check_file(
    report: Report, found: Identity, base: str | None, against: Sequence[str], expected: Stored | None
) -> None:
    """Ask everything, the cheapest first; the base model is asked only where the file itself is sound.

    Args:
        expected: what was trained, in float32, where it is known.
    """
    stored = report.run("settings", lambda: read(found.path), lambda read: f"{read.settings()['layer_structure']}")
    if stored is None:
        return
    report.run("finite", lambda: check(stored.tensors), lambda _: f"{len(stored.tensors)} tensors, all finite")
    network = report.run("keys", stored.network, lambda built: f"all read: pairs for widths {built.widths}")
    if network is None or not report.passed:
        return
    report.run("learned", lambda: _learned(network))
    if expected is not None:
        report.run("equal to memory", lambda: require_same(found.path, expected))
    if found.layout == "a1111":
        report.run("archive", lambda: check_archive(found.path))
        objection, required = comfyui_objection(stored.structure), "comfyui" in against
        report.run("comfyui", lambda: _comfyui(objection, required))
    for tool in against:
        if tool not in READERS[found.layout] and (tool, found.layout) != ("comfyui", "a1111"):
            report.run(tool, lambda tool=tool: _unread(tool, found))  # type: ignore[misc]
    if not report.passed or "diffusers" not in against:
        return
    _check_diffusers(report, found, load_base(found, base or _own_base(stored)), expected or stored)


def require_same(path: Path, expected: Stored) -> str:
    """The file holds, bit for bit, what ``expected`` is in its dtype.

    Raises:
        GuardError: it does not.
    """
    held = read(path)
    wanted = expected.without_dropout() if path.suffix == ".pt" else expected
    if held.structure != wanted.structure:
        raise GuardError(f"{path}: the file says {held.structure}, trained was {wanted.structure}")
    if differing := held.tensors.keys() ^ wanted.tensors.keys():
        raise GuardError(f"{path}: {min(differing)} is in one of file and memory alone")
    for name, tensor in held.tensors.items():
        if not torch.equal(tensor, wanted.tensors[name].to(tensor.dtype)):
            raise GuardError(f"{path}: {name} differs from what was trained")
    return f"bit for bit, {len(held.tensors)} tensors"


@torch.no_grad()
def _check_diffusers(report: Report, found: Identity, family: ModelFamily, expected: Stored) -> None:
    """Load the file into a fresh pipeline, and compare with the trained network before a denoiser of its own."""
    family.require("denoiser", *family.text_encoders)
    base = answer(family)
    dtype = next(iter(read(found.path).tensors.values())).dtype
    rounded = {name: tensor.to(dtype) for name, tensor in expected.tensors.items()}
    trained = Stored(expected.structure, rounded, {}).network()
    wanted = report.run("widths", lambda: _in_memory(family, trained), lambda _: f"{trained.widths} are the base's")
    if wanted is None:
        return
    pipeline = family.pipeline()
    loaded = load_hypernetwork(pipeline, found.path)
    report.run("diffusers: output", lambda: close(answer(family), wanted, base, 0.0))
    loaded.multiplier = 0.0
    report.run("diffusers: strength 0", lambda: _untouched(answer(family), base))


def _in_memory(family: ModelFamily, trained: Hypernetwork) -> Tensor:
    before = family.networks["denoiser"]
    family.networks["denoiser"] = family.fresh("denoiser")
    try:
        attach(family.networks["denoiser"], trained)
        return answer(family)
    finally:
        family.networks["denoiser"] = before


def _learned(network: Hypernetwork) -> str:
    """At least one of the networks adds something."""
    adding = [
        f"{width}.{role}"
        for width, pair in network.items()
        for role, mlp in pair.items()  # type: ignore[operator, union-attr]
        if bool(mlp(torch.ones(2, int(width)) + torch.arange(int(width))).any())
    ]
    if not adding:
        raise GuardError("nothing was learned: every network adds nothing at all")
    return f"{len(adding)} of {2 * len(network)} networks add something"


def _comfyui(objection: str | None, required: bool) -> str:
    if objection is None:
        return "draws with it as A1111 does"
    if required:
        raise GuardError(objection)
    return f"A1111 only: {objection}"


def _unread(tool: str, found: Identity) -> str:
    raise GuardError(f"{tool} reads no hypernetwork of layout {found.layout}")


def _untouched(got: Tensor, base: Tensor) -> str:
    if not torch.equal(got, base):
        raise GuardError("at strength 0 the denoiser does not answer as without the file")
    return "equal bit for bit to the untouched model"


def _own_base(stored: Stored) -> str | None:
    """The base that a ``.pt`` of ours names; in others it is a name of A1111's, which is no folder."""
    own = str(stored.facts.get("optional_info") or "").startswith("finetune ")
    return stored.facts.get("sd_checkpoint_name") if own else None
