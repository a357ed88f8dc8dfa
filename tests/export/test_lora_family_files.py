"""Files of DoRA, PiSSA, LoKr, LoHa and OFT: loaded by other ways than they were written, they answer as memory does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.adapters import attach
from finetune.config.adapters import AdapterConfig
from finetune.config.schema import ModelConfig
from finetune.errors import GuardError, UserError
from finetune.export import export, identify, pieces, read, verify
from finetune.export.kinds import kind
from finetune.families import load_family
from finetune.randomness import generator

DORA = {"kind": "lora", "rank": 4, "alpha": 2.0, "use_dora": True, "targets": "conv"}
PISSA = {"kind": "lora", "rank": 4, "alpha": 2.0, "init": "pissa", "targets": "conv"}
LOHA = {"kind": "loha", "rank": 2, "alpha": 3.0, "targets": "conv"}
LOKR = {"kind": "lokr", "rank": 4, "alpha": 3.0, "targets": "conv"}
SMALL_LOKR = {"kind": "lokr", "rank": 1, "alpha": 3.0, "targets": "conv"}
OFT = {"kind": "oft", "block_size": 4, "targets": "wide"}
SERIES = {**OFT, "exact": False}
LYCORIS = {"loha": LOHA, "lokr": LOKR, "lokr decomposed": SMALL_LOKR, "oft": OFT, "oft series": SERIES}


def trained(folder: Path, settings: dict[str, Any], std: float = 0.05) -> tuple[Any, Any]:
    """A family with an adapter of a text encoder and a denoiser, every value moved by a known draw."""
    family = load_family(ModelConfig(path=str(folder)))
    config = TypeAdapter(AdapterConfig).validate_python({**settings, "text_encoder": True})
    adapter: Any = attach(config, family, seed=0)
    with torch.no_grad():
        for name, parameter in adapter.parameters().items():
            parameter += std * torch.randn(parameter.shape, generator=generator(1, name))
    return family, adapter


def answer(unet: Any, text_encoder: Any) -> torch.Tensor:
    """What a denoiser and a text encoder make of fixed inputs."""
    with torch.no_grad():
        tokens = text_encoder(torch.arange(8)[None])[0]
        noisy = torch.randn((1, 4, 8, 8), generator=generator(0, "noisy"))
        return torch.cat((tokens.flatten(), unet(noisy, 300, tokens).sample.flatten()))


def answer_of(family: Any) -> torch.Tensor:
    family.require("denoiser", "text_encoder")
    return answer(family.networks["denoiser"], family.networks["text_encoder"])


def fresh(folder: Path) -> Any:
    return diffusers.StableDiffusionPipeline.from_pretrained(folder)


def test_dora_file_is_exact_in_diffusers(tiny_sd, recipe, tmp_path):
    """FORMATS 1.2: magnitudes under ``.weight``, or those of the text encoder would be skipped without a word."""
    family, adapter = trained(tiny_sd, DORA)
    (path,) = export(adapter.weights(), family, recipe(adapter=DORA), tmp_path)
    keys = load_file(path)
    assert path.name == "pytorch_lora_weights.safetensors"
    lengths = [key for key in keys if "magnitude" in key]
    assert lengths and all(key.endswith(".lora_magnitude_vector.weight") for key in lengths)
    assert any(key.startswith("text_encoder.text_model.") for key in lengths)
    pipeline = fresh(tiny_sd)
    pipeline.load_lora_weights(str(path))
    assert torch.equal(answer(pipeline.unet, pipeline.text_encoder), answer_of(family))
    result = verify(path, weights=adapter.weights()).require()
    assert {"diffusers: output", "diffusers: output at half"} <= {check.name for check in result.checks}
    assert verify(path).require()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dora_file_in_half_precision_verifies(dtype, tiny_sd, recipe, tmp_path):
    family, adapter = trained(tiny_sd, DORA)
    (path,) = export(adapter.weights(), family, recipe(adapter=DORA, export={"dtype": dtype}), tmp_path)
    assert verify(path, weights=adapter.weights()).require()


def test_dora_for_other_tools_is_whole_differences(tiny_sd, recipe, tmp_path):
    """FORMATS 1.5: a dora_scale of this axis is wrong in ComfyUI, Forge and A1111; a whole difference is right."""
    family, adapter = trained(tiny_sd, DORA)
    chosen = recipe(adapter=DORA, export={"formats": ["diffusers", "kohya"]})
    diffusers_file, path = export(adapter.weights(), family, chosen, tmp_path)
    tensors = load_file(path)
    assert {key.partition(".")[2] for key in tensors} == {"diff"}
    assert path.name == "zib.safetensors" and path.with_suffix(".json").is_file()
    assert (identify(path).kind, identify(path).layout) == ("lora", "difference")
    assert [one.path for one in pieces(tmp_path)] == [diffusers_file], "one file is drawn with, not both"
    pipeline = fresh(tiny_sd)
    modules = {f"lora_unet_{n.replace('.', '_')}": m for n, m in pipeline.unet.named_modules()}
    modules |= {f"lora_te_text_model_{n.replace('.', '_')}": m for n, m in pipeline.text_encoder.named_modules()}
    with torch.no_grad():
        for key, tensor in tensors.items():
            modules[key.partition(".")[0]].weight += tensor
    torch.testing.assert_close(answer(pipeline.unet, pipeline.text_encoder), answer_of(family), atol=1e-4, rtol=1e-4)
    result = verify(path, weights=adapter.weights()).require()
    assert {"comfyui", "a1111", "merged: loads, output"} <= {check.name for check in result.checks}


def test_dora_is_refused_by_kohyas_tools_in_words(tiny_sd, recipe, tmp_path):
    family, adapter = trained(tiny_sd, DORA)
    (path,) = export(adapter.weights(), family, recipe(adapter=DORA, export={"formats": ["kohya"]}), tmp_path)
    failed = [check for check in verify(path, against=["kohya"]).checks if not check.passed]
    assert [check.name for check in failed] == ["kohya"]


def test_dora_magnitude_that_is_lost_is_noticed(tiny_sd, recipe, tmp_path):
    family, adapter = trained(tiny_sd, DORA)
    (path,) = export(adapter.weights(), family, recipe(adapter=DORA), tmp_path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors.pop(next(key for key in tensors if "magnitude" in key))
    save_file(tensors, path, metadata)
    assert not verify(path, weights=adapter.weights()).passed


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_pissa_file_is_a_lora_of_twice_the_rank(layout, tiny_sd, recipe, tmp_path):
    """METHODS 1.5: on the original base it equals the trained model to 1e-4."""
    family, adapter = trained(tiny_sd, PISSA)
    chosen = recipe(adapter=PISSA, export={"formats": [layout]})
    (path,) = export(adapter.weights(), family, chosen, tmp_path)
    downs = [tensor for key, tensor in load_file(path).items() if "lora_A" in key or "lora_down" in key]
    assert {len(down) for down in downs} == {8}
    pipeline = fresh(tiny_sd)
    pipeline.load_lora_weights(str(path))
    torch.testing.assert_close(answer(pipeline.unet, pipeline.text_encoder), answer_of(family), atol=1e-4, rtol=1e-4)
    assert verify(path, weights=adapter.weights()).require()


@pytest.mark.parametrize("settings", LYCORIS.values(), ids=LYCORIS)
def test_peft_file_is_exact_in_peft(settings, tiny_sd, recipe, tmp_path):
    """METHODS 0.2.6: settings from the header, tensors by PEFT's own loader; bit-equal in a fresh pipeline."""
    family, adapter = trained(tiny_sd, settings)
    chosen = recipe(adapter=settings, export={"formats": ["peft"]})
    (path,) = export(adapter.weights(), family, chosen, tmp_path)
    with safe_open(path, "pt") as file:
        described = json.loads(file.metadata()["finetune.peft"])
    pipeline, tensors = fresh(tiny_sd), load_file(path)
    classes = {"LOKR": peft.LoKrConfig, "LOHA": peft.LoHaConfig, "OFT": peft.OFTConfig}
    for component, found in described.items():
        network = getattr(pipeline, component)
        network.add_adapter(classes[found["peft_type"]](**found))
        own = {key.removeprefix(f"{component}."): t for key, t in tensors.items() if key.startswith(f"{component}.")}
        assert not peft.set_peft_model_state_dict(network, own).unexpected_keys
    assert torch.equal(answer(pipeline.unet.eval(), pipeline.text_encoder.eval()), answer_of(family))
    assert not torch.allclose(answer_of(family), answer(fresh(tiny_sd).unet, fresh(tiny_sd).text_encoder), atol=1e-3)
    result = verify(path, weights=adapter.weights()).require()
    assert verify(path).passed
    halves = [check for check in result.checks if check.name == "peft: output at half"]
    assert bool(halves) == (settings["kind"] != "oft")


def by_hand(tensors: dict[str, torch.Tensor], stem: str) -> torch.Tensor:
    """A change as ComfyUI, Forge and A1111 compute it, from the keys of one layer (FORMATS 1.4)."""
    part = {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.partition(".")[0] == stem}
    alpha = float(part["alpha"])
    if "hada_w1_a" in part:
        product = torch.einsum("or,ri,os,si->oi", *(part[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b")))
        return alpha / len(part["hada_w1_b"]) * product
    dim = len(part["lokr_w2_b"]) if "lokr_w2_b" in part else None
    second = part["lokr_w2_a"] @ part["lokr_w2_b"] if dim else part["lokr_w2"].flatten(1)
    product = torch.einsum("ab,cd->acbd", part["lokr_w1"], second)
    product = product.reshape(product.shape[0] * product.shape[1], -1)
    return product * (alpha / dim if dim else 1.0)


@pytest.mark.parametrize("settings", [LOHA, LOKR, SMALL_LOKR], ids=["loha", "lokr", "lokr decomposed"])
def test_kohya_file_gives_other_tools_the_same_change(settings, tiny_sd, recipe, tmp_path):
    """FORMATS 1.4: with the readers' own rule for alpha, which ignores it where both factors of LoKr are whole."""
    family, adapter = trained(tiny_sd, settings)
    chosen = recipe(adapter=settings, export={"formats": ["kohya"]})
    (path,) = export(adapter.weights(), family, chosen, tmp_path)
    tensors = load_file(path)
    assert path.name == "zib.safetensors" and path.with_suffix(".json").is_file()
    prefixes = {"denoiser": "lora_unet_", "text_encoder": "lora_te_text_model_"}
    decomposed = set()
    for name, layer in adapter.layers.items():
        network, _, module = name.partition(".")
        stem = prefixes[network] + module.replace(".", "_")
        delta = layer.get_delta_weight("default").detach()
        torch.testing.assert_close(by_hand(tensors, stem).view(delta.shape), delta, rtol=1e-4, atol=1e-6)
        decomposed.add(f"{stem}.lokr_w2_a" in tensors)
    assert len({key.partition(".")[0] for key in tensors}) == len(adapter.layers)
    if settings["kind"] == "lokr":
        assert decomposed == ({True} if settings["rank"] == 1 else {True, False})
    result = verify(path, weights=adapter.weights()).require()
    assert {"comfyui", "a1111", "merged: loads, output"} <= {check.name for check in result.checks}
    pipeline = fresh(tiny_sd)
    kind("lycoris").apply(pipeline, identify(path), 1.0)
    torch.testing.assert_close(answer(pipeline.unet, pipeline.text_encoder), answer_of(family), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("settings", LYCORIS.values(), ids=LYCORIS)
def test_files_in_half_precision_verify(settings, dtype, tiny_sd, recipe, tmp_path):
    family, adapter = trained(tiny_sd, settings)
    for path in export(adapter.weights(), family, recipe(adapter=settings, export={"dtype": dtype}), tmp_path):
        assert verify(path, weights=adapter.weights()).require()


@pytest.mark.parametrize("settings", LYCORIS.values(), ids=LYCORIS)
def test_a_run_is_drawn_with_one_of_its_files(settings, tiny_sd, recipe, tmp_path):
    family, adapter = trained(tiny_sd, settings)
    paths = export(adapter.weights(), family, recipe(adapter=settings), tmp_path / "adapters")
    layouts = [identify(path).layout for path in paths]
    assert layouts == (["peft"] if settings["kind"] == "oft" else ["peft", "kohya"])
    assert [(one.kind, one.layout) for one in pieces(tmp_path)] == [("lycoris", "peft")]
    pipeline = fresh(tiny_sd)
    kind("lycoris").apply(pipeline, identify(paths[0]), 1.0)
    assert torch.equal(answer(pipeline.unet, pipeline.text_encoder), answer_of(family))
    assert identify(paths[0]).metadata["finetune.algorithm"] == settings["kind"]


def test_a_rotation_has_no_strength(tiny_sd, recipe, tmp_path):
    family, adapter = trained(tiny_sd, OFT)
    (path,) = export(adapter.weights(), family, recipe(adapter=OFT), tmp_path)
    with pytest.raises(UserError, match=r"no strength but 1, not 0\.5"):
        kind("lycoris").apply(fresh(tiny_sd), identify(path), 0.5)


@pytest.mark.parametrize("settings", LYCORIS.values(), ids=LYCORIS)
def test_what_learned_nothing_is_not_written(settings, tiny_sd, recipe, tmp_path):
    family, adapter = trained(tiny_sd, settings, std=0.0)
    with pytest.raises(GuardError, match="nothing was learned in denoiser"):
        export(adapter.weights(), family, recipe(adapter=settings), tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("settings", "layout", "change", "check"),
    [
        (LOHA, "kohya", lambda t: t.pop(next(k for k in t if k.endswith("hada_w2_b"))), "keys"),
        (LOKR, "kohya", lambda t: t.update({"lora_unet_more.lokr_t2": torch.ones(1)}), "keys"),
        (
            LOHA,
            "kohya",
            lambda t: t.update({k: v * 2 for k, v in t.items() if k.endswith(".alpha")}),
            "equal to memory",
        ),
        (LOKR, "peft", lambda t: t.pop(next(k for k in t if k.endswith("lokr_w1"))), "equal to memory"),
        (OFT, "peft", lambda t: t.update({"vae.conv.oft_R.weight": torch.ones(1, 1)}), "keys"),
        (OFT, "peft", lambda t: [v.zero_() for v in t.values()], "learned"),
        (LOHA, "peft", lambda t: next(iter(t.values())).view(-1).__setitem__(0, float("nan")), "finite"),
    ],
)
def test_damage_is_named(settings, layout, change, check, tiny_sd, recipe, tmp_path):
    family, adapter = trained(tiny_sd, settings)
    chosen = recipe(adapter=settings, export={"formats": [layout]})
    (path,) = export(adapter.weights(), family, chosen, tmp_path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)
    assert check in {one.name for one in verify(path, weights=adapter.weights()).checks if not one.passed}


def test_a_rotation_without_its_flag_is_refused(tiny_sd, recipe, tmp_path):
    """METHODS 1.1: without settings the numbers mean nothing."""
    family, adapter = trained(tiny_sd, OFT)
    (path,) = export(adapter.weights(), family, recipe(adapter=OFT), tmp_path)
    save_file(load_file(path), path, {"format": "pt", "finetune.base": str(tiny_sd)})
    (failed,) = [one for one in verify(path).checks if not one.passed]
    assert failed.name == "keys" and "finetune.peft" in failed.detail


def test_the_other_rule_of_rotation_is_noticed(tiny_sd, recipe, tmp_path):
    """The flag decides which way the numbers turn: a file with the wrong one does not answer as memory does."""
    family, adapter = trained(tiny_sd, OFT)
    (path,) = export(adapter.weights(), family, recipe(adapter=OFT), tmp_path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    described = json.loads(metadata["finetune.peft"])
    for settings in described.values():
        settings["use_cayley_neumann"] = True
    save_file(load_file(path), path, {**metadata, "finetune.peft": json.dumps(described)})
    assert "peft: loads, output" in {
        one.name for one in verify(path, weights=adapter.weights()).checks if not one.passed
    }


def test_a_file_of_another_base_does_not_fit(tiny_sd, recipe, tmp_path):
    family, adapter = trained(tiny_sd, {**LOKR, "targets": "attention"})
    _, path = export(adapter.weights(), family, recipe(adapter=LOKR), tmp_path)
    tensors = load_file(path)
    renamed = {key.replace("mid_block", "mid_block_attentions_9"): tensor for key, tensor in tensors.items()}
    save_file(renamed, path, {"finetune.base": str(tiny_sd)})
    with pytest.raises(UserError, match=r"the pipeline has no layer unet\.mid_block\.attentions\.9"):
        kind("lycoris").apply(fresh(tiny_sd), identify(path), 1.0)


@pytest.mark.parametrize("settings", [DORA, PISSA, LOHA, LOKR, OFT], ids=["dora", "pissa", "loha", "lokr", "oft"])
def test_read_gives_an_adapter_back_bit_for_bit(settings, tiny_sd, recipe, tmp_path):
    settings = {**settings, "alpha": 4.0} if settings["kind"] == "lora" else settings
    family, adapter = trained(tiny_sd, settings)
    path = export(adapter.weights(), family, recipe(adapter=settings), tmp_path)[0]
    back, weights = read(path, family.export_names), adapter.weights()
    assert back.kind == weights.kind and back.settings == weights.settings
    assert back.tensors.keys() == weights.tensors.keys()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in weights.tensors.items())
    again, other = trained(tiny_sd, settings, std=0.0)
    other.load(back.tensors)
    assert torch.equal(answer_of(again), answer_of(family))


def test_differences_are_no_factors(tiny_sd, recipe, tmp_path):
    family, adapter = trained(tiny_sd, DORA)
    (path,) = export(adapter.weights(), family, recipe(adapter=DORA, export={"formats": ["kohya"]}), tmp_path)
    with pytest.raises(UserError, match="no factors"):
        read(path, family.export_names)
