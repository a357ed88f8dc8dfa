"""What is written, and that it is read back as it was by the tools that it is written for."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import GuardError, UserError
from finetune.export import export, identify, layers, read, verify
from finetune.files import PARTIAL

GOLDEN = Path(__file__).parent / "golden"


def rescaled(weights, alpha):
    """The same factors with other alphas, one per layer."""
    tensors = {
        name: torch.tensor(alpha(name)) if name.endswith(".alpha") else tensor
        for name, tensor in weights.tensors.items()
    }
    return replace(weights, tensors=tensors)


def answer(unet, text_encoder):
    """What a denoiser and a text encoder make of fixed inputs."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        tokens = text_encoder(torch.arange(8)[None])[0]
        noisy = torch.randn((1, 4, 8, 8), generator=rng)
        return torch.cat((tokens.flatten(), unet(noisy, 300, tokens).sample.flatten()))


def answer_of(family):
    family.require("denoiser", "text_encoder")
    return answer(family.networks["denoiser"], family.networks["text_encoder"])


def loaded_answer(base, path):
    """The same by way of a fresh pipeline and diffusers' own loader."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(str(path))
    return answer(pipeline.unet, pipeline.text_encoder)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    ("settings", "exact"),
    [
        ({"rank": 4, "alpha": 4.0}, True),
        ({"rank": 4, "alpha": 2.0}, True),
        ({"rank": 4, "alpha": 3.0, "targets": "conv", "text_encoder": True}, False),
        ({"rank": 4, "alpha": 2.0, "targets": "conv", "text_encoder": True, "use_rslora": True}, False),
    ],
    ids=["alpha=rank", "alpha=rank/2", "conv+text", "rslora"],
)
def test_fresh_pipeline_answers_as_the_trained_networks_do(
    layout, settings, exact, tiny_sd, tiny_family, trained, recipe, tmp_path
):
    family, adapter = trained(**settings)
    (path,) = export(adapter.weights(), family, recipe(export={"formats": [layout]}), tmp_path / "adapters")
    expected, untouched = answer_of(family), answer_of(tiny_family)
    got = loaded_answer(tiny_sd, path)
    assert not torch.allclose(expected, untouched, atol=1e-3), "the adapter must matter, else the test says nothing"
    if exact:
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_linear_projections_load_too(tiny_sd_v, trained, recipe, tmp_path):
    """SD 2 has linear layers where SD 1 has 1x1 convolutions."""
    family, adapter = trained(folder=tiny_sd_v, rank=2, targets="conv", text_encoder=True)
    chosen = recipe(model={"path": str(tiny_sd_v)})
    for path in export(adapter.weights(), family, chosen, tmp_path / "adapters"):
        torch.testing.assert_close(loaded_answer(tiny_sd_v, path), answer_of(family), atol=1e-6, rtol=1e-6)
        assert verify(path, weights=adapter.weights()).require()


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_golden_names(layout, trained, recipe, tmp_path):
    """Names and shapes of every tensor, as other tools know them."""
    family, adapter = trained(rank=2, alpha=1.0, targets="conv", text_encoder=True)
    (path,) = export(adapter.weights(), family, recipe(export={"formats": [layout]}), tmp_path)
    lines = [f"{name} {list(tensor.shape)}" for name, tensor in sorted(load_file(path).items())]
    assert lines == (GOLDEN / f"sd-conv-{layout}.txt").read_text().splitlines()


def test_text_encoder_keys_hold_the_level_that_other_tools_expect(trained, recipe, tmp_path):
    family, adapter = trained(rank=2, text_encoder=True)
    diffusers_file, kohya_file = export(adapter.weights(), family, recipe(), tmp_path)
    keys = [key for key in load_file(diffusers_file) if key.startswith("text_encoder.")]
    assert keys and all(key.startswith("text_encoder.text_model.encoder.layers.") for key in keys)
    keys = [key for key in load_file(kohya_file) if key.startswith("lora_te_")]
    assert keys and all(key.startswith("lora_te_text_model_encoder_layers_") for key in keys)


def test_kohya_file_states_one_alpha_and_keeps_every_scale(trained, recipe, tmp_path):
    """diffusers gives attention layers the most frequent alpha, so different ones would be mixed up without a word."""
    family, adapter = trained(rank=4)
    weights = rescaled(adapter.weights(), lambda name: 8.0 if "attn2" in name else 2.0)
    (path,) = export(weights, family, recipe(export={"formats": ["kohya"]}), tmp_path)
    assert len({tensor.item() for key, tensor in load_file(path).items() if key.endswith(".alpha")}) == 1
    before, after = layers(weights), layers(read(path, family.export_names))
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new.delta(), old.delta(), rtol=1e-6, atol=0)
    assert verify(path, weights=weights).require()


def test_half_precision_keeps_scales_that_it_cannot_write(trained, recipe, tmp_path):
    """An rsLoRA alpha is no number that bfloat16 holds."""
    family, adapter = trained(rank=3, use_rslora=True)
    chosen = recipe(export={"formats": ["diffusers", "kohya"], "dtype": "bfloat16"})
    for path in export(adapter.weights(), family, chosen, tmp_path):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
        assert verify(path, weights=adapter.weights()).require()


def test_missing_text_projections_are_written_as_zeros(trained, recipe, tmp_path):
    """Readers that fuse the four projections drop them all where one is missing."""
    family, adapter = trained(rank=2, text_encoder=True)
    weights = adapter.weights()
    kept = {
        k: v for k, v in weights.tensors.items() if not ("text_encoder" in k and ("out_proj" in k or "k_proj" in k))
    }
    (path,) = export(replace(weights, tensors=kept), family, recipe(export={"formats": ["kohya"]}), tmp_path)
    ups = {key: value for key, value in load_file(path).items() if key.startswith("lora_te") and "lora_up" in key}
    assert len(ups) == 2 * 4
    assert all(bool(up.any()) != ("out_proj" in key or "k_proj" in key) for key, up in ups.items())
    assert verify(path, weights=replace(weights, tensors=kept)).require()


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_read_gives_the_weights_back_bit_for_bit(layout, trained, recipe, tmp_path):
    family, adapter = trained(rank=4, targets="conv", text_encoder=True)
    (path,) = export(adapter.weights(), family, recipe(export={"formats": [layout]}), tmp_path)
    back, weights = read(path, family.export_names), adapter.weights()
    assert back.tensors.keys() == weights.tensors.keys()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in weights.tensors.items())
    assert back.settings == weights.settings
    adapter.load(back.tensors)


def test_header_says_what_the_file_is(tiny_sd, trained, recipe, tmp_path):
    family, adapter = trained(rank=4, alpha=2.0)
    paths = export(adapter.weights(), family, recipe(), tmp_path)
    for path, layout in zip(paths, ("diffusers", "kohya"), strict=True):
        found = identify(path)
        assert (found.kind, found.layout, found.base) == ("lora", layout, str(tiny_sd))
        assert found.metadata["format"] == "pt"
        assert found.metadata["modelspec.trigger_phrase"] == "zib star"
        assert found.metadata["modelspec.architecture"] == "stable-diffusion-custom/lora"
    header = identify(paths[1]).metadata
    assert (header["ss_network_module"], header["ss_network_dim"], header["ss_network_alpha"]) == (
        "networks.lora",
        "4",
        "2.0",
    )
    side = json.loads(paths[1].with_suffix(".json").read_text())
    assert side["activation text"] == "zib star"


def test_files_are_called_what_tools_look_for(tiny_sd, trained, recipe, tmp_path):
    family, adapter = trained(rank=2)
    export(adapter.weights(), family, recipe(), tmp_path / "zib" / "adapters")
    names = sorted(file.name for file in (tmp_path / "zib" / "adapters").iterdir())
    assert names == ["pytorch_lora_weights.safetensors", "zib.json", "zib.safetensors"]
    assert identify(tmp_path / "zib").path.name == "pytorch_lora_weights.safetensors"
    assert torch.equal(loaded_answer(tiny_sd, tmp_path / "zib" / "adapters"), answer_of(family))


def test_equal_runs_write_equal_bytes(trained, recipe, tmp_path):
    family, adapter = trained(rank=2)
    first = export(adapter.weights(), family, recipe(), tmp_path / "a")
    second = export(adapter.weights(), family, recipe(output=str(tmp_path / "elsewhere")), tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda name, t: t * 0 if name.endswith("lora_B.weight") else t, "nothing was learned in denoiser"),
        (lambda name, t: t * float("nan") if "mid_block" in name and t.ndim else t, "NaN"),
        (lambda name, t: t.new_zeros(0) if "mid_block" in name and t.ndim else t, "is empty"),
        (lambda name, t: t.to(torch.int32) if "mid_block" in name else t, "int32"),
        (lambda name, t: None if name.endswith(".alpha") and "mid_block" in name else t, "alpha"),
        (lambda name, t: None, "no tensors"),
    ],
    ids=["all zero", "nan", "empty", "integers", "no alpha", "nothing"],
)
def test_useless_weights_are_refused_and_nothing_is_written(spoil, says, trained, recipe, tmp_path):
    family, adapter = trained(rank=2)
    weights = adapter.weights()
    spoilt = {name: new for name, old in weights.tensors.items() if (new := spoil(name, old)) is not None}
    with pytest.raises(GuardError, match=says):
        export(replace(weights, tensors=spoilt), family, recipe(), tmp_path / "adapters")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_text_encoder_that_learned_nothing_is_named(trained, recipe, tmp_path):
    family, adapter = trained(rank=2, text_encoder=True)
    weights = adapter.weights()
    still = {
        n: t * 0 if n.startswith("text_encoder") and n.endswith("lora_B.weight") else t
        for n, t in weights.tensors.items()
    }
    with pytest.raises(GuardError, match="nothing was learned in text_encoder"):
        export(replace(weights, tensors=still), family, recipe(), tmp_path)


def _export_forever(weights, family, recipe, folder):
    while True:
        export(weights, family, recipe, folder)


def test_killed_export_leaves_whole_files_and_the_next_one_cleans_up(trained, recipe, tmp_path):
    family, adapter = trained(rank=2)
    weights, folder = adapter.weights(), tmp_path / "adapters"
    whole = [path.read_bytes() for path in export(weights, family, recipe(), folder)]
    context = multiprocessing.get_context("fork")
    for wait in (0.02, 0.05, 0.08):
        process = context.Process(target=_export_forever, args=(weights, family, recipe(), folder))
        process.start()
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        files = sorted(folder.glob("[!.]*.safetensors"))
        assert [file.read_bytes() for file in files] == whole
    (folder / f"{PARTIAL}1234-zib.safetensors").write_bytes(b"half")
    export(weights, family, recipe(), folder)
    assert not list(folder.glob(f"{PARTIAL}*"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("lora.ckpt", b"\x80\x04", ".ckpt is not read"),
        ("lora.safetensors", b"no safetensors at all", "no whole safetensors file"),
        ("empty", None, "holds no adapter"),
    ],
)
def test_what_is_no_adapter_is_named(name, content, says, tmp_path):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        identify(path)
