"""``verify`` passes what is right and names what is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.errors import GuardError, UserError
from finetune.export import export, verify


@pytest.fixture
def exported(trained, recipe, tmp_path):
    """Weights of a LoRA and its two files."""
    family, adapter = trained(rank=4, alpha=2.0, targets="wide", text_encoder=True)
    weights = adapter.weights()
    return weights, dict(zip(("diffusers", "kohya"), export(weights, family, recipe(), tmp_path), strict=True))


def rewrite(path, change, header=None):
    """Change a file's tensors, keeping its header."""
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), **(header or {})}
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def failures(path, **options):
    return {check.name: check.detail for check in verify(path, **options).checks if not check.passed}


def test_what_was_exported_passes_everywhere(exported):
    weights, paths = exported
    for layout, path in paths.items():
        for given in (weights, None):
            result = verify(path, weights=given).require()
            names = {check.name for check in result.checks}
            assert {"finite", "keys", "learned", "shapes", "diffusers: output", "diffusers: half strength"} <= names
            assert ({"kohya", "comfyui", "a1111"} <= names) == (layout == "kohya")
    outputs = {check.name: check.detail for check in verify(paths["diffusers"]).checks}
    assert outputs["diffusers: output"] == "equal bit for bit"
    assert "ok" in str(result)


@pytest.mark.parametrize(
    ("layout", "change", "check"),
    [
        ("kohya", lambda t: [t.pop(k) for k in list(t) if k.endswith(".alpha")], "header"),
        ("kohya", lambda t: t.update({k: v * 2 for k, v in t.items() if k.endswith(".alpha")}), "header"),
        ("kohya", lambda t: t.pop(next(k for k in t if k.endswith("lora_up.weight"))), "keys"),
        ("diffusers", lambda t: t.pop(next(k for k in t if k.endswith("lora_A.weight"))), "keys"),
        ("diffusers", lambda t: [t.pop(k) for k in list(t) if "mid_block" in k and "attn1.to_q" in k], "header"),
        ("diffusers", lambda t: t.update({"unet.mid_block.more.alpha": torch.ones(1)}), "keys"),
        ("kohya", lambda t: t.update({"lora_unet_more.lora_mid.weight": torch.ones(1)}), "keys"),
        ("diffusers", lambda t: t.update({"vae.conv_in.lora_A.weight": torch.ones(4, 4)}), "keys"),
        ("diffusers", lambda t: next(iter(t.values())).view(-1).__setitem__(0, float("nan")), "finite"),
        ("diffusers", lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k], "learned"),
        ("diffusers", lambda t: t.update({next(iter(t)): torch.zeros(0, 16)}), "finite"),
        ("kohya", lambda t: t.clear(), "readable"),
    ],
    ids=[
        "dropped alphas",
        "other alphas",
        "missing up",
        "missing A",
        "missing layer",
        "extra alpha",
        "extra mid",
        "extra component",
        "nan",
        "all zero",
        "empty tensor",
        "no tensors",
    ],
)
def test_damage_is_named_even_without_the_weights(layout, change, check, exported):
    path = exported[1][layout]
    rewrite(path, change)
    assert check in failures(path)
    with pytest.raises(GuardError, match=path.name):
        verify(path).require()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: next(v for k, v in t.items() if "lora_B" in k).mul_(2),
        lambda t: [t.pop(k) for k in list(t) if "mid_block" in k],
        lambda t: t.update(
            {k.replace("mid_block", "down_blocks.9"): v.clone() for k, v in list(t.items()) if "mid_block" in k}
        ),
    ],
    ids=["another number", "a missing block", "an extra block"],
)
def test_a_file_that_is_not_what_was_trained(change, exported):
    weights, paths = exported
    rewrite(paths["diffusers"], change)
    assert "equal to memory" in failures(paths["diffusers"], weights=weights)


def test_weights_with_another_scale_are_not_the_same(exported):
    """An exporter that forgets alpha writes a file twice as strong."""
    weights, paths = exported
    doubled = {k: v * 2 if k.endswith(".alpha") else v for k, v in weights.tensors.items()}
    assert "equal to memory" in failures(paths["diffusers"], weights=replace(weights, tensors=doubled))


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_file_is_a_failed_check(kept, exported):
    path = exported[1]["diffusers"]
    path.write_bytes(path.read_bytes()[:kept])
    assert "no whole safetensors file" in failures(path)["readable"]


def test_layer_that_the_base_lacks_and_shape_that_does_not_fit(exported):
    path = exported[1]["diffusers"]
    rewrite(
        path, lambda t: t.update({k.replace("mid_block", "mid_block.new"): t.pop(k) for k in list(t) if "mid_" in k})
    )
    assert "the base model has no layer denoiser.mid_block.new" in failures(path)["shapes"]
    rewrite(path, lambda t: t.update({k: torch.ones(4, 99) for k in t if k.endswith("k_proj.lora_A.weight")}))
    assert "[16, 99]" in failures(path)["shapes"]


def test_alphas_that_differ_are_refused_as_diffusers_would_mix_them(exported):
    path = exported[1]["kohya"]
    header = {"finetune.layout": "", "ss_network_alpha": ""}
    rewrite(path, lambda t: t[next(k for k in t if k.endswith("to_q.alpha"))].mul_(2), header)
    assert "different alphas" in failures(path)["alpha"]


def test_incomplete_text_attention_is_refused_as_diffusers_would_drop_it(exported):
    path = exported[1]["kohya"]
    rewrite(path, lambda t: [t.pop(k) for k in list(t) if "out_proj" in k])
    assert "out_proj is missing beside its siblings" in failures(path)["attention"]


def test_other_tools_do_not_read_the_diffusers_layout(exported):
    assert "layout kohya" in failures(exported[1]["diffusers"], against=["a1111"])["a1111"]


def test_kohya_does_not_know_layers_outside_of_blocks(trained, recipe, tmp_path):
    family, adapter = trained(rank=2, targets=[r"conv_in", r".*attn2\.to_[kv]"])
    (path,) = export(adapter.weights(), family, recipe(export={"formats": ["kohya"]}), tmp_path)
    assert failures(path) == {"kohya": "1 of 9 layers have no place there, for example lora_unet_conv_in"}


def test_base_is_named_or_an_error(exported, tiny_sd):
    path = exported[1]["diffusers"]
    rewrite(path, lambda t: None, {"finetune.base": ""})
    with pytest.raises(UserError, match="--base"):
        verify(path)
    assert verify(path, base=str(tiny_sd)).passed


def test_unknown_reader_and_missing_file(exported, tmp_path):
    with pytest.raises(UserError, match="did you mean 'comfyui'"):
        verify(exported[1]["kohya"], against=["comfy-ui"])
    with pytest.raises(UserError, match="no such file"):
        verify(tmp_path / "nothing")
