"""Every method on every family in every layout: nothing is lost on the way to a file, and previews are its pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from finetune import formats
from finetune.adapter import Weights
from finetune.config.schema import SamplerConfig
from finetune.export import layers, read, verify
from finetune.export.lycoris import changes
from finetune.export.lycoris_kohya import unpack
from finetune.export.read import identify, read_tensors
from finetune.export.sample import as_exported, sample
from finetune.families import families
from finetune.sampling import draw

PROMPTS, SAMPLER = ["a <zib> star"], SamplerConfig(steps=1, guidance=3.0)
ROOT = Path(__file__).parents[1]
QUICK = {*((name, "lora") for name in families()), *(("sd", method) for method in ("dora", "lokr", "pivotal"))}
"""Cells for every run; the others are for the nightly one. tests/recipes/test_matrix.py trains most of them."""
CELLS = [pytest.param(*cell, marks=[] if cell in QUICK else [pytest.mark.slow]) for cell in formats.places()]
COLUMNS = [pytest.param(name, marks=[] if name in ("sd", "sd3") else [pytest.mark.slow]) for name in families()]


def weights_after(weights: Weights, family: Any) -> dict[str, Tensor]:
    """What a LoRA or its relatives make of the layers' weights, float32, by canonical name."""
    found = layers(weights) if weights.kind == "lora" else changes(weights)
    bases = {network: family.fresh(network) for network in {one.network for one in found}}
    return {one.name: one.changed(bases[one.network].get_parameter(f"{one.module}.weight").detach()) for one in found}


def lost(path: Path, weights: Weights, family: Any) -> float:
    """The largest difference between what a file holds and what was trained, relative to the largest number."""
    found, names = identify(path), family.export_names
    if found.kind == "pivotal":
        return 0.0  # its halves are compared as files of their own, bit for bit by verify
    if found.layout == "difference" or (found.kind == "lycoris" and found.layout == "kohya"):
        told = unpack(read_tensors(path), names)
        bases = {network: family.fresh(network) for network in {one.network for one in told}}
        here = {o.name: o.changed(bases[o.network].get_parameter(f"{o.module}.weight").detach()) for o in told}
        there = weights_after(weights, family)
        # layers that files have as one may hold zeros for those that were not trained
        assert there.keys() <= here.keys()
        return max(float((here[name] - there[name]).abs().max() / there[name].abs().max()) for name in there)
    back = read(path, names)
    if weights.kind in ("lora", "lycoris"):
        here, there = weights_after(back, family), weights_after(weights, family)
        assert there.keys() <= here.keys()
        return max(float((here[name] - there[name]).abs().max() / there[name].abs().max()) for name in there)
    assert weights.tensors.keys() <= back.tensors.keys()
    return max(float((back.tensors[name] - tensor).abs().max()) for name, tensor in weights.tensors.items())


@pytest.mark.parametrize(("name", "method"), CELLS)
def test_every_file_is_what_was_trained_and_so_is_a_preview(
    name: str, method: str, twins: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each key is read and has a place in every tool that the file is for, and the numbers are the same: exactly,
    unless a layout has no place for a scale, which is then multiplied in.
    """
    family, adapter, recipe = formats.made(twins(name), method)
    before = {key: value.clone() for key, value in family.networks.state_dict().items()}
    parts = [part.weights() for part in adapter.parts()]
    files = list(formats.written(parts, family, recipe, tmp_path / "all"))
    assert files
    for layout, weights, path in files:
        verify(path, weights=weights).require()
        arithmetic = weights.kind in ("lora", "lycoris") or layout == "difference"
        assert lost(path, weights, family) <= (1e-6 if arithmetic else 0.0), (layout, path.name)
    twin = family.twin(adapter.set_aside())
    half = formats.asking(recipe, None, "float16")
    for weights in parts:
        formats.export(weights, family, half, tmp_path / "adapters")
    (tmp_path / "preview").mkdir()
    drawn = draw(as_exported(parts, twin, half, tmp_path / "preview"), PROMPTS, 1, SAMPLER, seed=3, resolution=32)
    expected = sample(tmp_path / "adapters", PROMPTS, seed=3, sampler=SAMPLER, resolution=32)
    assert np.array_equal(np.asarray(drawn[0]), np.asarray(expected[0]))
    after = family.networks.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())


def page() -> dict[tuple[str, str, str], str]:
    """The matrix of docs/formats.md, by method, layout and family."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs" / "formats.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    start = next(place for place, row in enumerate(rows) if row[:2] == ["method", "layout"])
    names = [name.strip("`") for name in rows[start][2:]]
    table = [row for row in rows[start + 2 :] if row[0] in formats.METHODS and len(row) == len(names) + 2]
    return {(*row[:2], name): said for row in table for name, said in zip(names, row[2:], strict=True)}


@pytest.mark.parametrize("name", COLUMNS)
def test_the_page_of_formats_says_what_the_code_says(name: str, twins: Callable[[str], Path]) -> None:
    held = {(cell.method, cell.layout): formats.short(cell) for cell in formats.cells(name, twins(name))}
    said = {(method, layout): text for (method, layout, family), text in page().items() if family == name}
    assert held.items() <= said.items(), "stale: put what `finetune formats` prints into docs/formats.md"
    assert all(text == formats.short(None) for place, text in said.items() if place not in held)


def test_every_family_and_every_method_has_a_cell() -> None:
    assert {name for name, _ in formats.places()} == set(families()) == {name for _, _, name in page()}
    assert {method for _, method in formats.places()} == set(formats.METHODS) == {method for method, _, _ in page()}
