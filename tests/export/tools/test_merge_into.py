"""Adapters put into a model: every weight is the base's and its change, and diffusers draws as with the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from finetune.adapters import attach
from finetune.config.adapters import AdapterConfig
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.export import export, kinds, verify
from finetune.export.read import identify
from finetune.export.tools.merge_into import merge_into
from finetune.export.tools.method import Method
from finetune.families import load_family
from finetune.randomness import generator


def weights(folder: Path, component: str) -> dict[str, torch.Tensor]:
    return {
        key: one for file in sorted((folder / component).glob("*.safetensors")) for key, one in load_file(file).items()
    }


def test_every_weight_is_the_bases_and_its_change(model, files, tmp_path):
    layers, path, _ = files(model, targets="conv")
    made = merge_into([path], str(model), tmp_path / "m", Method("concat", (0.5,)), strength=1.5)
    assert made.weights == len(layers)
    verify(made.path).require()
    names = load_family(ModelConfig(path=str(model))).export_names
    for network, called in names.items():
        before, after = weights(model, called.diffusers), weights(made.path, called.diffusers)
        changed = {f"{called.missing_level}{one.module}.weight": one for one in layers if one.network == network}
        before = {called.missing_level + key.removeprefix(called.missing_level): one for key, one in before.items()}
        assert before.keys() == after.keys() and changed.keys() <= after.keys()
        for key, tensor in before.items():
            wanted = tensor + 0.75 * changed[key].delta() if key in changed else tensor
            torch.testing.assert_close(after[key], wanted, rtol=1e-6, atol=1e-7)
            assert key in changed or torch.equal(after[key], tensor), key
    assert (weights(made.path, "vae").keys()) == weights(model, "vae").keys()


def test_a_sharded_base_stays_in_shards(files, tiny_sd, tmp_path):
    _, path, _ = files(tiny_sd)
    pipeline: Any = DiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    pipeline.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    made = merge_into([path], str(tmp_path / "base"), tmp_path / "m", Method("concat", (1.0,)))
    shards = sorted((tmp_path / "base" / "unet").glob("*.safetensors"))
    assert len(shards) > 1 and [one.name for one in shards] == sorted(
        one.name for one in (made.path / "unet").glob("*.safetensors")
    )
    whole = merge_into([path], str(tiny_sd), tmp_path / "w", Method("concat", (1.0,)))
    one, other = weights(made.path, "unet"), weights(whole.path, "unet")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_several_adapters_by_a_method(files, other, tiny_sd, tmp_path):
    """Nothing is cut off at a rank: TIES in a model is TIES' whole change."""
    from finetune.export.tools.merge import Whole
    from finetune.export.tools.method import whole
    from finetune.export.tools.source import Source

    paths = [files(tiny_sd)[1], other(tiny_sd, 5)]
    method = Method("ties", (1.0, 1.0), density=0.5)
    made = merge_into(paths, str(tiny_sd), tmp_path / "m", method)
    change = whole(method, [Whole(Source(path)) for path in paths])
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    before, after = (weights(folder, "unet")[f"{name}.weight"] for folder in (tiny_sd, made.path))
    torch.testing.assert_close(after - before, change(f"denoiser.{name}"), rtol=1e-4, atol=1e-6)
    assert torch.linalg.matrix_rank(after - before) > 8
    added = merge_into(paths, str(tiny_sd), tmp_path / "sum", Method("sum", (0.5, 0.5)))
    assert added.weights == made.weights


def test_half_precision_is_rounded_once(files, tiny_sd, tmp_path):
    layers, path, _ = files(tiny_sd)
    made = merge_into([path], str(tiny_sd), tmp_path / "m", Method("concat", (1.0,)), dtype="float16")
    layer = next(one for one in layers if one.network == "denoiser")
    before, after = (weights(folder, "unet")[f"{layer.module}.weight"] for folder in (tiny_sd, made.path))
    assert torch.equal(after, layer.changed(before).half())
    assert {one.dtype for one in weights(made.path, "vae").values()} == {torch.float16}


@pytest.mark.parametrize(
    "settings",
    [{"kind": "loha", "rank": 2}, {"kind": "oft", "block_size": 4}, {"kind": "lora", "rank": 2, "use_dora": True}],
    ids=lambda one: one["kind"],
)
def test_other_kinds_draw_as_by_their_own_loader(settings, tiny_sd, recipe, tmp_path):
    family = load_family(ModelConfig(path=str(tiny_sd)))
    attached: Any = attach(TypeAdapter(AdapterConfig).validate_python(settings), family, seed=0)
    with torch.no_grad():
        for group in attached.groups():
            for name, parameter in group.parameters.items():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator(1, name))
    path = export(attached.weights(), family, recipe(adapter=settings), tmp_path / "run")[0]
    made = merge_into([path], str(tiny_sd), tmp_path / "m", Method("concat", (1.0,)))
    loaded: Any = DiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    kinds.kind(identify(path).kind).apply(loaded, identify(path), 1.0)
    merged: Any = DiffusionPipeline.from_pretrained(made.path)
    asked = (
        torch.randn(1, 4, 8, 8, generator=generator(0, "x")),
        400,
        torch.randn(1, 5, 16, generator=generator(0, "p")),
    )
    with torch.no_grad():
        torch.testing.assert_close(loaded.unet(*asked).sample, merged.unet(*asked).sample, rtol=1e-4, atol=1e-5)
    if settings["kind"] == "oft":
        with pytest.raises(UserError, match=r"no strength but 1, not 0\.5"):
            merge_into([path], str(tiny_sd), tmp_path / "no", Method("concat", (0.5,)))
    with pytest.raises(UserError, match="no plain LoRA"):
        merge_into([path], str(tiny_sd), tmp_path / "no", Method("ties", (1.0,)))


def test_what_does_not_fit_is_refused_and_nothing_is_left(files, tiny_sd, tmp_path):
    _, path, _ = files(tiny_sd)
    with pytest.raises(UserError, match="not overwritten"):
        merge_into([path], str(tiny_sd), tmp_path, Method("concat", (1.0,)))
    tensors = load_file(path)
    key = next(key for key in sorted(tensors) if key.endswith("attn1.to_q.lora_A.weight"))
    save_file({**tensors, key: tensors[key][:, :7].contiguous()}, tmp_path / "narrow.safetensors")
    with pytest.raises(UserError, match=r"the model's weight is \[16, 16\], which does not fit"):
        merge_into([tmp_path / "narrow.safetensors"], str(tiny_sd), tmp_path / "no", Method("concat", (1.0,)))
    elsewhere = {key.replace("mid_block.", "mid_block.9."): one for key, one in tensors.items()}
    save_file(elsewhere, tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match=r"has no weight denoiser\.mid_block\.9"):
        merge_into([tmp_path / "elsewhere.safetensors"], str(tiny_sd), tmp_path / "no", Method("concat", (1.0,)))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["elsewhere.safetensors", "narrow.safetensors"]
