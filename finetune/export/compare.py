"""What checks of files have in common: one fixed question to a model, and how close two answers are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from finetune.errors import GuardError
from finetune.export import readers
from finetune.export.read import Identity
from finetune.family import ModelFamily
from finetune.randomness import generator

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # rounding of a product of two factors


def mapped(
    tool: str, tensors: Mapping[str, Tensor], found: Identity, readable: Sequence[str], family: ModelFamily
) -> str:
    """Whether a tool has a place for every layer of a file of kohya's naming.

    Raises:
        GuardError: it has not, or it reads no such files.
    """
    if tool not in readable:
        raise GuardError(f"reads no files of layout {found.layout}; give it the one of layout kohya")
    networks = {name: family.networks[name] for name in family.export_names}
    known = readers.TOOLS[tool](networks, family.export_names)
    stems = {key.partition(".")[0] for key in tensors}
    if unmapped := sorted(stems - known.keys()):
        raise GuardError(f"{len(unmapped)} of {len(stems)} layers have no place there, for example {unmapped[0]}")
    runs = tool == "kohya" or readers.standard_geometry(networks["denoiser"])
    note = "" if runs else " (by their names: it runs no model of these sizes)"
    return f"{len(stems)} of {len(stems)} layers have a place{note}"


def identical(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Whether a file's tensors are, bit for bit, what was trained, and no others are there.

    Raises:
        GuardError: they are not.
    """
    if missing := wanted.keys() - tensors.keys():
        raise GuardError(f"{len(missing)} tensors are missing, for example {min(missing)}")
    if extra := tensors.keys() - wanted.keys():
        raise GuardError(f"{len(extra)} tensors are not part of what was trained, for example {min(extra)}")
    for key, tensor in wanted.items():
        if not torch.equal(tensor, tensors[key]):
            raise GuardError(f"{key} differs from what was trained")
    return f"bit for bit, {len(wanted)} tensors"


def close(got: Tensor, wanted: Tensor, base: Tensor, tolerance: float) -> str:
    """Whether two answers are equal, measured by how large they are, and differ from the base model's.

    Raises:
        GuardError: they are not, or do not.
    """
    error = difference(got, wanted)
    if error > 10 * tolerance:  # a network adds up what its layers round
        raise GuardError(f"prompt encoding and denoiser answer are off by {error:.1e}")
    if torch.equal(got, base):
        raise GuardError("the adapter changes neither the prompt encoding nor the denoiser's answer")
    return "equal bit for bit" if error == 0.0 else f"equal, largest difference {error:.1e}"


def difference(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    scale = float(wanted.abs().max())
    return float((got - wanted).abs().max()) / (scale or 1.0)


def answer(family: ModelFamily) -> Tensor:
    """An encoded prompt and the denoiser's answer to it, both flattened into one tensor."""
    cells = 2 * family.pixel_multiple // family.latent_scale
    noisy = torch.randn((1, family.latent_channels, cells, cells), generator=generator(0, "verify"))
    prompt = family.encode_prompt(["a photo of a dog"])
    geometry = torch.tensor([[0, 0, 0, 0, 0, 0]])
    answer = family.predict(noisy, torch.tensor([400]), prompt, geometry)
    pooled = () if prompt.pooled is None else (prompt.pooled.flatten(),)
    return torch.cat((prompt.tokens.flatten(), *pooled, answer.flatten()))
