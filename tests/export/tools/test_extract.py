"""What a merge put in comes out again."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import UserError
from finetune.export import verify
from finetune.export.tools.extract import extract
from finetune.export.tools.lowrank import Rule
from finetune.export.tools.merge_into import merge_into
from finetune.export.tools.method import Method
from finetune.export.tools.source import Source
from finetune.families.tiny import write_tiny_sd


@pytest.mark.parametrize(("base", "targets", "to"), [("tiny_sd", "conv", "diffusers"), ("tiny_sdxl", "wide", "kohya")])
def test_a_merged_lora_comes_out(base, targets, to, files, tmp_path, request):
    """Of linear and convolution layers, of the text encoders too."""
    model = request.getfixturevalue(base)
    layers, path, _ = files(model, targets=targets)
    tuned = merge_into([path], str(model), tmp_path / "tuned", Method("concat", (1.0,))).path
    made = extract(str(tuned), str(model), tmp_path / "x.safetensors", Rule(rank=4), to=to)
    assert made.ranks.keys() == {layer.name for layer in layers} and not made.left
    source = Source(made.path)
    for layer in layers:
        wanted, found = layer.delta(), source.layer(layer.name).delta()
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max(), layer.name
    assert made.kept > 1 - 1e-8
    if to == "diffusers":
        verify(made.path).require()


def test_ranks_follow_the_rule(tiny_sd, files, tmp_path):
    path = files(tiny_sd)[1]
    tuned = merge_into([path], str(tiny_sd), tmp_path / "tuned", Method("concat", (1.0,))).path
    made = extract(str(tuned), str(tiny_sd), tmp_path / "x.safetensors", Rule(energy=0.8), dtype="float16")
    assert min(made.ranks.values()) < max(made.ranks.values()) <= 4
    assert 0.8 <= made.kept < 1
    assert {one.dtype for one in load_file(made.path).values()} == {torch.float16}


def test_what_a_lora_has_no_place_for_is_named(tiny_sd, tmp_path):
    shutil.copytree(tiny_sd, tmp_path / "tuned")
    file = tmp_path / "tuned" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"] += 0.1
    tensors["conv_in.bias"] += 0.1
    tensors["conv_norm_out.weight"] += 0.1
    save_file(tensors, file, {"format": "pt"})
    file = tmp_path / "tuned" / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    table = next(key for key in tensors if key.endswith("token_embedding.weight"))
    tensors[table] += 0.1
    save_file(tensors, file, {"format": "pt"})
    made = extract(str(tmp_path / "tuned"), str(tiny_sd), tmp_path / "x.safetensors", Rule(rank=1))
    assert made.ranks == {"denoiser.conv_in": 1}
    assert made.left == [
        "denoiser.conv_in.bias",
        "denoiser.conv_norm_out.weight",
        "text_encoder.embeddings.token_embedding.weight",
    ]


def test_models_that_cannot_be_compared(tiny_sd, tiny_sdxl, tmp_path):
    out = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match=r"of family sdxl, .* of sd"):
        extract(str(tiny_sdxl), str(tiny_sd), out, Rule(rank=1))
    with pytest.raises(UserError, match="no layers"):
        extract(str(tiny_sd), str(tiny_sd), out, Rule(rank=1))
    linear = write_tiny_sd(tmp_path / "linear", linear_projection=True)
    with pytest.raises(UserError, match=r"proj_in\.weight is \[16, 16\] in .*, and|different sizes"):
        extract(str(linear), str(tiny_sd), out, Rule(rank=1))
    assert not out.exists()
