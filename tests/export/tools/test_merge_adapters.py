"""LoRAs merged with each other: the change of every layer is what the method's formula says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import UserError
from finetune.export import verify
from finetune.export.read import read_header
from finetune.export.tools import combine
from finetune.export.tools.merge import merge
from finetune.export.tools.method import Method
from finetune.export.tools.source import Source


def changes(path: Path) -> dict[str, torch.Tensor]:
    source = Source(path)
    return {name: source.layer(name).delta() for name in source}


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_concat_is_the_exact_sum_in_every_layout(to, model, files, other, tmp_path):
    _, one, _ = files(model)
    two = other(model, 5, rank=2)
    made = merge([one, two], tmp_path / "m.safetensors", Method("concat", (1.0, -0.5)), to=to)
    before, after = (changes(path) for path in (one, two)), changes(made.path)
    first, second = before
    for name, change in first.items():
        torch.testing.assert_close(after[name], change - 0.5 * second[name], rtol=1e-5, atol=1e-6)
    source = Source(made.path)
    assert {layer.rank for layer in source.outline.values()} == {6} and made.kept == 1.0
    header = read_header(made.path)[1]
    assert header["finetune.recipe"] == "merge" and header["finetune.base"] == str(model)
    assert '"weights": "1, -0.5"' in header["finetune.settings"] and "finetune.seed" not in header


def test_a_merged_file_is_loaded_by_diffusers(files, other, tiny_sd, tmp_path):
    made = merge([files(tiny_sd)[2], other(tiny_sd, 5)], tmp_path / "m.safetensors", Method("svd", (0.5, 0.5)))
    assert Source(made.path).layout == "kohya", "as the first file is"
    checks = {check.name for check in verify(made.path).require().checks}
    assert {"alpha", "diffusers: merged weights", "comfyui"} <= checks


def test_svd_is_the_sum_cut_off(files, other, tiny_sd, tmp_path):
    paths = [files(tiny_sd)[1], other(tiny_sd, 5)]
    made = merge(paths, tmp_path / "m.safetensors", Method("svd", (0.5, 0.5)), rank=3)
    first, second = (changes(path) for path in paths)
    squares, lost = 0.0, 0.0
    for name, change in changes(made.path).items():
        whole = (0.5 * first[name] + 0.5 * second[name]).double()
        u, values, v = torch.linalg.svd(whole, full_matrices=False)
        wanted = (u[:, :3] * values[:3] @ v[:3]).float()
        torch.testing.assert_close(change, wanted, rtol=1e-4, atol=1e-5)
        squares, lost = squares + float(values.square().sum()), lost + float(values[3:].square().sum())
    assert made.kept == pytest.approx(1 - lost / squares, rel=1e-4) and made.kept < 0.999


def test_a_sum_with_itself_is_twice_as_much(files, tiny_sd, tmp_path):
    layers, path, _ = files(tiny_sd)
    made = merge([path, path], tmp_path / "m.safetensors", Method("sum", (0.5, 1.5)))
    roots = 0.5**0.5 + 1.5**0.5
    for name, change in changes(made.path).items():
        wanted = next(layer for layer in layers if layer.name == name).delta()
        torch.testing.assert_close(change, roots**2 * wanted)
    assert {layer.rank for layer in Source(made.path).outline.values()} == {4}


def test_ties_trims_by_the_whole_adapter(files, other, tiny_sd, tmp_path):
    """By the paper's formula on one long vector, written out here."""
    paths = [files(tiny_sd)[1], other(tiny_sd, 5), other(tiny_sd, 6)]
    made = merge(paths, tmp_path / "m.safetensors", Method("ties", (1.0, 1.0, 1.0), density=0.3), rank=16)
    held = [changes(path) for path in paths]
    names = sorted(held[0])
    vectors = torch.stack([torch.cat([one[name].flatten() for name in names]) for one in held])
    kept = round(0.3 * vectors.shape[1])
    limits = vectors.abs().sort(dim=1, descending=True).values[:, kept - 1 : kept]
    trimmed = torch.where(vectors.abs() >= limits, vectors, 0.0)
    sign = trimmed.sum(0).sign()
    agree = (trimmed.sign() == sign) & (trimmed != 0)
    wanted = (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)
    found = changes(made.path)
    torch.testing.assert_close(torch.cat([found[name].flatten() for name in names]), wanted, rtol=1e-3, atol=1e-5)
    assert made.kept > 0.9999, "rank 16 holds any change of these layers"


@pytest.mark.parametrize("method", ["dare-sum", "dare-ties"])
def test_dare_drops_by_its_named_draws(method, files, other, tiny_sd, tmp_path):
    paths = [files(tiny_sd)[1], other(tiny_sd, 5)]
    asked = Method(method, (1.0, 0.5), drop=0.4, seed=3)
    made = merge(paths, tmp_path / "m.safetensors", asked, rank=16)
    held = [changes(path) for path in paths]
    for name, change in changes(made.path).items():
        dropped = [combine.dropped(one[name], 0.4, 3, place, name) for place, one in enumerate(held)]
        join = combine.elected if method == "dare-ties" else combine.weighted_sum
        torch.testing.assert_close(change, join(dropped, (1.0, 0.5)), rtol=1e-3, atol=1e-5)
    again = merge(paths, tmp_path / "again.safetensors", asked, rank=16)
    assert again.path.read_bytes() == made.path.read_bytes()


def test_a_layer_that_one_file_lacks_is_the_others(files, other, tiny_sd, tmp_path):
    _, one, _ = files(tiny_sd)
    two = other(tiny_sd, 5, text_encoder=False)
    made = merge([one, two], tmp_path / "m.safetensors", Method("concat", (2.0, 1.0)))
    first, second, after = (changes(path) for path in (one, two, made.path))
    assert first.keys() == after.keys() != second.keys()
    for name in first.keys() - second.keys():
        torch.testing.assert_close(after[name], 2 * first[name])


def test_what_does_not_belong_together_is_refused(files, other, tiny_sd, tiny_sdxl, tmp_path):
    _, one, _ = files(tiny_sd)
    out = tmp_path / "no.safetensors"

    def refused(words: str, *paths: Path, method: str = "concat", count: int | None = None, **settings) -> None:
        weights = (1.0,) * (count or len(paths))
        with pytest.raises(UserError, match=words):
            merge(list(paths), out, Method(method, weights, **settings))
        assert not out.exists()

    refused("2 adapters, but 3 weights", one, one, count=3)
    refused("models of different kinds", one, files(tiny_sdxl)[1])
    refused(r"has rank 4 in .* 2 in .*concat or svd", one, other(tiny_sd, 5, rank=2), method="sum")
    refused("is DoRA, whose changes do not add up", one, files(tiny_sd, use_dora=True)[1])
    refused("did you mean 'ties'", one, one, method="tiesed")
    refused("density is 0", one, one, method="ties", density=0.0)
    with pytest.raises(UserError, match="rank 2 has no part in concat"):
        merge([one, one], out, Method("concat", (1.0, 1.0)), rank=2)
    refused("drop is 1", one, one, method="dare-sum", drop=1.0)
    tensors, said = load_file(one), read_header(one)[1]
    save_file(tensors, tmp_path / "base.safetensors", {**said, "finetune.base": "tinyworld"})
    refused(r"trained on .*model and .* on tinyworld .*--base", one, tmp_path / "base.safetensors")
    merge([one, tmp_path / "base.safetensors"], tmp_path / "m.safetensors", Method("concat", (1, 1)), base=str(tiny_sd))
    key = next(key for key in sorted(tensors) if key.endswith("attn1.to_q.lora_A.weight"))
    save_file({**tensors, key: tensors[key][:, :7].contiguous()}, tmp_path / "narrow.safetensors", said)
    refused(r"changes a weight \[16, 16\] in .*, \[16, 7\] in", one, tmp_path / "narrow.safetensors")
