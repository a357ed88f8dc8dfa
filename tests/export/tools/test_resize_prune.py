"""Smaller files of a LoRA: fewer ranks, fewer layers."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from finetune.adapters import attach
from finetune.config.adapters import AdapterConfig
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.export import export, verify
from finetune.export.read import read_header
from finetune.export.tools.lowrank import Rule
from finetune.export.tools.prune import prune
from finetune.export.tools.resize import resize
from finetune.export.tools.source import Source
from finetune.families import load_family
from finetune.randomness import generator


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_resized_layers_are_the_nearest_of_their_rank(layout, model, files, tmp_path):
    layers, *paths = files(model)
    made = resize(paths[layout == "kohya"], tmp_path / "r.safetensors", Rule(rank=2))
    source = Source(made.path)
    assert source.layout == layout
    lost, whole = 0.0, 0.0
    for layer in layers:
        values = torch.linalg.svdvals(layer.delta().double().flatten(1))
        error = (source.layer(layer.name).delta() - layer.delta()).double().square().sum()
        torch.testing.assert_close(error, values[2:].square().sum(), rtol=1e-4, atol=1e-12)
        lost, whole = lost + float(error), whole + float(values.square().sum())
    assert {pair for name, pair in made.ranks.items()} == {(4, 2)}
    assert made.kept == pytest.approx(1 - lost / whole, rel=1e-5)
    said = read_header(made.path)[1]
    assert '"resized": "rank 2"' in said["finetune.settings"]
    if layout == "kohya":
        assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("2", "2.0")


def test_a_resized_file_is_loaded_by_diffusers(files, tiny_sd, tmp_path):
    made = resize(files(tiny_sd)[2], tmp_path / "r.safetensors", Rule(frobenius=0.8))
    assert len({after for _, after in made.ranks.values()}) > 1
    assert made.kept >= 0.64
    verify(made.path).require()


def test_to_the_rank_that_it_has_nothing_changes(files, tiny_sd, tmp_path):
    layers, path, _ = files(tiny_sd)
    made = resize(path, tmp_path / "r.safetensors", Rule(rank=64))
    source = Source(made.path)
    for layer in layers:
        torch.testing.assert_close(source.layer(layer.name).delta(), layer.delta(), rtol=1e-5, atol=1e-7)
    assert made.kept == pytest.approx(1.0)


def test_kept_layers_are_bit_for_bit_what_they_were(model, files, tmp_path):
    _, *paths = files(model)
    for path in paths:
        made = prune(path, tmp_path / path.name, drop=["mid_block", "text_encoder"], keep=["attn1", "text_encoder"])
        before, after = load_file(path), load_file(made.path)
        assert after.keys() < before.keys() and all(torch.equal(before[key], after[key]) for key in after)
        assert len(made.kept) + len(made.dropped) == len(Source(path).outline)
        assert all(".attn1." in name and "mid_block" not in name for name in made.kept if name.startswith("denoiser"))
        assert not any(name.startswith("text_encoder.") for name in made.kept), "what is dropped wins"
        assert read_header(made.path)[1]["finetune.layers"] == str(len(made.kept))


def test_patterns_are_whole_parts_of_paths(files, tiny_sd, tmp_path):
    _, path, _ = files(tiny_sd)
    made = prune(path, tmp_path / "p.safetensors", keep=["unet.down_blocks.0"])
    assert made.kept and all(name.startswith("denoiser.down_blocks.0.") for name in made.kept)
    verify(made.path).require()
    for pattern, words in (("block", "fits none"), ("attn", "fits none"), ("(", "no regular expression")):
        with pytest.raises(UserError, match=words):
            prune(path, tmp_path / "no.safetensors", drop=[pattern])
    with pytest.raises(UserError, match="no layer of"):
        prune(path, tmp_path / "no.safetensors", drop=["unet", "text_encoder"])
    with pytest.raises(UserError, match="every layer of"):
        prune(path, tmp_path / "no.safetensors", keep=["unet", "text_encoder"])
    with pytest.raises(UserError, match="say which"):
        prune(path, tmp_path / "no.safetensors")
    assert not (tmp_path / "no.safetensors").exists()


def test_lokr_is_pruned_but_not_resized(tiny_sd, recipe, tmp_path):
    settings = {"kind": "lokr", "rank": 1, "alpha": 4.0}
    family = load_family(ModelConfig(path=str(tiny_sd)))
    attached = attach(TypeAdapter(AdapterConfig).validate_python(settings), family, seed=0)
    with torch.no_grad():
        for group in attached.groups():
            for name, parameter in group.parameters.items():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator(1, name))
    for path in export(attached.weights(), family, recipe(adapter=settings), tmp_path / "run"):
        made = prune(path, tmp_path / path.name, drop=["mid_block"])
        before, after = load_file(path), load_file(made.path)
        assert after.keys() < before.keys() and all(torch.equal(before[key], after[key]) for key in after)
        verify(made.path).require()
        with pytest.raises(UserError, match="cannot be changed without training"):
            resize(path, tmp_path / "no.safetensors", Rule(rank=1))
