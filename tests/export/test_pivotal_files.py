"""Files of words and weights: apart, bundled, and as a delta; what they give back is what was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import finetune
from finetune.adapters import attach
from finetune.adapters.pivotal import Pivotal
from finetune.cli import app
from finetune.config.adapters import PivotalConfig
from finetune.config.schema import ModelConfig, Recipe, SamplerConfig
from finetune.errors import GuardError, UserError
from finetune.export import export, identify, pieces, read, verify
from finetune.export.merge_concepts import closed_form, merge_concepts, ordinary_prompts
from finetune.export.read import read_header
from finetune.export.sample import adapted, sample
from finetune.families import load_family
from finetune.family import ModelFamily
from finetune.randomness import generator

MakeRecipe = Callable[..., Recipe]
LORA: dict[str, Any] = {"kind": "lora", "rank": 2, "alpha": 4.0, "text_encoder": True}  # a scale of 2 rounds nothing
FULL = {"kind": "full", "select": "cross-kv", "detach_start": True}


def section(weights: dict[str, Any], token: str = "<t>") -> dict[str, Any]:
    words = {"kind": "embedding", "tokens": [{"token": token, "vectors": 2, "initializer": "star"}]}
    return {"kind": "pivotal", "embedding": words, "weights": weights}


def trained(folder: Path, weights: dict[str, Any], token: str = "<t>", seed: int = 1) -> tuple[ModelFamily, Pivotal]:
    """As after training: everything has moved by a known draw."""
    family = load_family(ModelConfig(path=str(folder)))
    adapter = attach(PivotalConfig.model_validate(section(weights, token)), family, 0)
    assert isinstance(adapter, Pivotal)
    with torch.no_grad():
        for group in adapter.groups():
            for name, parameter in group.parameters.items():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator(seed, name)))
    return family, adapter


def written(adapter: Pivotal, family: ModelFamily, recipe: Recipe, folder: Path) -> dict[str, Path]:
    """Every file, verified against memory."""
    paths = []
    for part in adapter.parts():
        weights = part.weights()
        for path in export(weights, family, recipe, folder):
            verify(path, weights=weights).require()
            paths.append(path)
    return {path.name: path for path in paths}


def answer(family: ModelFamily, pipeline: Any = None, caption: str = "a red <t> on grass") -> Tensor:
    """Through a pipeline where one is given, else through the family, with the word in the prompt."""
    noisy = torch.randn(1, 4, 8, 8, generator=generator(0, "noisy"))
    with torch.no_grad():
        if pipeline is None:
            tokens = family.encode_prompt([caption]).tokens
            unet = family.networks["denoiser"]
        else:
            tokens, unet = pipeline.encode_prompt(caption, torch.device("cpu"), 1, False)[0], pipeline.unet
        out: Tensor = unet(noisy, torch.tensor([300]), encoder_hidden_states=tokens, return_dict=False)[0]
    return out


def fresh(tiny: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)


@pytest.fixture
def make(recipe: MakeRecipe) -> MakeRecipe:
    return lambda weights, token="<t>", **sections: recipe(
        recipe="pivotal",
        adapter=section(weights, token),
        data={"concepts": [{"folder": "p", "prompt": f"a photo of {token} star", "trigger": token}], "resolution": 16},
        **sections,
    )


def test_both_files_in_a_fresh_pipeline_are_bit_equal_to_memory(
    tiny_sd: Path, make: MakeRecipe, tmp_path: Path
) -> None:
    """METHODS 7: reload of both files in a fresh pipeline is bit-equal to in-memory."""
    family, adapter = trained(tiny_sd, LORA)
    files = written(adapter, family, make(LORA), tmp_path / "zib" / "adapters")
    assert sorted(files) == [
        "learned_embeds.safetensors",
        "pytorch_lora_weights.safetensors",
        "t.pt",
        "t.safetensors",
        "zib-bundle.safetensors",
        "zib.safetensors",
    ]
    wanted = answer(family)
    untouched = fresh(tiny_sd)
    untouched.load_textual_inversion(files["learned_embeds.safetensors"])
    assert not torch.equal(answer(family, untouched), wanted)
    for layers in ("pytorch_lora_weights.safetensors", "zib.safetensors"):
        pipeline = fresh(tiny_sd)
        pipeline.load_textual_inversion(files["learned_embeds.safetensors"])
        pipeline.load_lora_weights(files[layers])
        assert torch.equal(answer(family, pipeline), wanted)


def test_a_run_is_all_its_pieces_and_not_the_bundle_beside_them(
    tiny_sd: Path, make: MakeRecipe, tmp_path: Path
) -> None:
    family, adapter = trained(tiny_sd, LORA)
    files = written(adapter, family, make(LORA), tmp_path / "zib" / "adapters")
    found = pieces(tmp_path / "zib")
    assert [(one.kind, one.layout) for one in found] == [("lora", "diffusers"), ("embedding", "diffusers")]
    wanted = answer(family)
    for path in (tmp_path / "zib", files["zib-bundle.safetensors"]):
        loaded = adapted(path)
        assert torch.equal(answer(loaded, loaded.pipeline()), wanted)
    half = adapted(tmp_path / "zib", strength=0.5)  # of the LoRA: a word is there or not
    assert not torch.equal(answer(half, half.pipeline()), wanted)
    sampler = SamplerConfig(steps=1)
    assert sample(tmp_path / "zib", ["a <t>"], sampler=sampler, resolution=16)[0].size == (16, 16)


def test_a_bundle_is_a_lora_with_words_in_it(tiny_sd: Path, make: MakeRecipe, tmp_path: Path) -> None:
    """FORMATS 1.7: ``bundle_emb.<name>.string_to_param.*``, as A1111 from 1.7 on reads it; diffusers refuses it."""
    family, adapter = trained(tiny_sd, LORA)
    files = written(adapter, family, make(LORA, export={"formats": ["bundle"]}), tmp_path / "zib")
    assert set(files) == {"zib-bundle.safetensors"}
    path = files["zib-bundle.safetensors"]
    assert (identify(path).kind, identify(path).layout) == ("pivotal", "bundle")
    tensors = load_file(path)
    rows = tensors.pop("bundle_emb.<t>.string_to_param.*")
    assert torch.equal(rows, adapter.words.weights().tensors["text_encoder.<t>"])
    assert all(key.startswith(("lora_unet_", "lora_te_text_model_")) for key in tensors)
    assert as_a1111_reads_it(load_file(path)) == {"<t>": {"string_to_param": {"*": (2, 16)}}}
    with pytest.raises((ValueError, KeyError, RuntimeError)):
        fresh(tiny_sd).load_lora_weights(path)
    assert (tmp_path / "zib" / "zib-bundle.json").is_file()


def as_a1111_reads_it(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What its loader of networks collects under ``bundle_emb``: the first two dots part the key."""
    found: dict[str, Any] = {}
    for key, tensor in tensors.items():
        head, _, rest = key.partition(".")
        if head == "bundle_emb":
            name, what = rest.split(".", 1)
            holder, _, star = what.partition(".")
            found.setdefault(name, {}).setdefault(holder, {})[star] = tuple(tensor.shape)
    return found


@pytest.mark.parametrize("damage", ["rows", "width", "key", "layer"])
def test_a_damaged_bundle_fails(damage: str, tiny_sd: Path, make: MakeRecipe, tmp_path: Path) -> None:
    family, adapter = trained(tiny_sd, LORA)
    files = written(adapter, family, make(LORA, export={"formats": ["bundle"]}), tmp_path / "zib")
    path, key = files["zib-bundle.safetensors"], "bundle_emb.<t>.string_to_param.*"
    tensors, header = load_file(path), read_header(path)[1]
    if damage == "rows":
        tensors[key] = tensors[key] + 1e-3
    elif damage == "width":
        tensors[key] = tensors[key][:, :8].contiguous()
    elif damage == "key":
        tensors["bundle_emb.<t>.clip_q"] = tensors.pop(key)
    else:
        tensors.pop(next(name for name in tensors if name.endswith("lora_up.weight")))
    save_file(tensors, path, header)
    assert not verify(path, weights=adapter.weights()).passed
    if damage != "rows":  # what is wrong in itself is seen without knowing what was trained
        assert not verify(path).passed


def test_a_delta_holds_the_trained_weights_alone_and_answers_bit_for_bit(
    tiny_sd: Path, make: MakeRecipe, tmp_path: Path
) -> None:
    """METHODS 6.4: a k/v-only checkpoint applied on the base reproduces the output bit-equal."""
    family, adapter = trained(tiny_sd, FULL)
    files = written(adapter, family, make(FULL), tmp_path / "zib")
    assert sorted(files) == ["delta.safetensors", "learned_embeds.safetensors", "t.pt", "t.safetensors"]
    held = load_file(files["delta.safetensors"])
    assert len(held) == 8
    assert all(key.startswith("unet.") and key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for key in held)
    wanted = answer(family)
    pipeline = fresh(tiny_sd)
    pipeline.load_textual_inversion(files["learned_embeds.safetensors"])
    before = answer(family, pipeline)
    assert finetune.load_delta(pipeline, files["delta.safetensors"], 0.0) == 8
    assert torch.equal(answer(family, pipeline), before)
    finetune.load_delta(pipeline, files["delta.safetensors"])
    assert torch.equal(answer(family, pipeline), wanted)
    assert not torch.equal(before, wanted)
    loaded = adapted(tmp_path / "zib")
    assert torch.equal(answer(loaded, loaded.pipeline()), wanted)
    back = read(files["delta.safetensors"], family.export_names)
    assert all(torch.equal(back.tensors[name], value) for name, value in adapter.layers.weights().tensors.items())


def test_a_whole_model_is_written_where_it_is_asked_for(tiny_sd: Path, make: MakeRecipe, tmp_path: Path) -> None:
    family, adapter = trained(tiny_sd, FULL)
    recipe = make(FULL, export={"formats": ["diffusers", "delta"]})
    files = written(adapter, family, recipe, tmp_path / "zib")
    assert sorted(files) == ["delta.safetensors", "learned_embeds.safetensors", "model"]
    assert [(one.kind, one.layout) for one in pieces(tmp_path / "zib")] == [
        ("full", "model"),
        ("embedding", "diffusers"),
    ]
    loaded = adapted(tmp_path / "zib")
    assert torch.equal(answer(loaded, loaded.pipeline()), answer(family))


def test_a_text_encoder_in_a_delta_has_the_names_of_its_files(
    tiny_sd: Path, trained_full: Any, recipe: MakeRecipe, tmp_path: Path
) -> None:
    family, adapter = trained_full
    chosen = recipe(adapter={"kind": "full"}, export={"formats": ["delta"]})
    (path,) = export(adapter.weights(), family, chosen, tmp_path)
    verify(path, weights=adapter.weights()).require()
    assert any(key.startswith("text_encoder.text_model.") for key in load_file(path))
    pipeline = fresh(tiny_sd)
    finetune.load_delta(pipeline, path)
    assert torch.equal(answer(family, pipeline, "a star"), answer(family, None, "a star"))


@pytest.fixture
def trained_full(trained: Callable[..., Any]) -> Any:
    return trained("full", select="cross-kv", text_encoder=True)


def test_a_delta_that_does_not_fit_or_learned_nothing_is_refused(
    tiny_sd: Path, make: MakeRecipe, tmp_path: Path
) -> None:
    family = load_family(ModelConfig(path=str(tiny_sd)))
    adapter = attach(PivotalConfig.model_validate(section(FULL)), family, 0)
    assert isinstance(adapter, Pivotal)
    with pytest.raises(GuardError, match="nothing was learned"):
        export(adapter.layers.weights(), family, make(FULL), tmp_path / "none")
    family, adapter = trained(tiny_sd, FULL)
    (path,) = export(adapter.layers.weights(), family, make(FULL), tmp_path)
    tensors, header = load_file(path), read_header(path)[1]
    key = min(tensors)
    for changed, text in (
        ({**tensors, key: torch.ones(3, 3)}, "the pipeline's"),
        ({**tensors, "unet.nowhere": torch.ones(3)}, "no weight"),
        ({**tensors, "prior.nowhere": torch.ones(3)}, "no prior"),
    ):
        save_file(changed, path, header)
        with pytest.raises(UserError, match=text):
            finetune.load_delta(fresh(tiny_sd), path)
        assert not verify(path).passed
    save_file({**tensors, key: tensors[key] + 1}, path, header)
    assert not verify(path, weights=adapter.layers.weights()).passed
    save_file(tensors, path)
    with pytest.raises(UserError, match="no delta"):
        finetune.load_delta(fresh(tiny_sd), path)


# METHODS 6.3 and 6.4: merging in closed form


def concept(folder: Path, tiny: Path, make: MakeRecipe, token: str, seed: int) -> tuple[ModelFamily, Pivotal]:
    family, adapter = trained(tiny, FULL, token, seed)
    written(adapter, family, make(FULL, token), folder)
    return family, adapter


def values(unet: Any, tokens: Tensor) -> Tensor:
    """All keys and values that are made of a prompt's rows [n, D]."""
    layers = [part for name, part in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    with torch.no_grad():
        return torch.cat([part(tokens).flatten() for part in layers])


def rows(pipeline: Any, prompt: str) -> Tensor:
    expanded = pipeline.maybe_convert_prompt(prompt, pipeline.tokenizer)
    count = len(pipeline.tokenizer(expanded, add_special_tokens=False).input_ids)
    encoded: Tensor = pipeline.encode_prompt(prompt, torch.device("cpu"), 1, False)[0]
    return encoded[0, 1 : 1 + count]


def test_one_concept_merged_gives_its_own_outputs_and_keeps_the_others(
    tiny_sd: Path, make: MakeRecipe, tmp_path: Path
) -> None:
    """METHODS 6.4: merge of one concept = its own weights' outputs on target words to 1e-4, on K nearly unchanged."""
    concept(tmp_path / "a", tiny_sd, make, "<t>", 1)
    merge_concepts([tmp_path / "a"], tmp_path / "merged")
    own, merged = adapted(tmp_path / "a").pipeline(), adapted(tmp_path / "merged").pipeline()
    base: Any = fresh(tiny_sd)
    target = rows(own, "<t> star")
    assert torch.equal(target, rows(merged, "<t> star"))
    torch.testing.assert_close(values(merged.unet, target), values(own.unet, target), rtol=0, atol=1e-4)
    assert (values(base.unet, target) - values(own.unet, target)).abs().max() > 1e-2

    kept = torch.cat([rows(own, prompt) for prompt in ordinary_prompts(load_family(ModelConfig(path=str(tiny_sd))))])
    moved = (values(merged.unet, kept) - values(base.unet, kept)).square().mean()
    whole = (values(own.unet, kept) - values(base.unet, kept)).square().mean()
    assert moved < 0.5 * whole, "less than what training moved"


def test_two_concepts_keep_what_each_word_says(tiny_sd: Path, make: MakeRecipe, tmp_path: Path) -> None:
    for name, token, seed in (("a", "<t>", 1), ("b", "<u>", 2)):
        concept(tmp_path / name, tiny_sd, make, token, seed)
    path = merge_concepts([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert verify(path).passed
    assert read_header(path)[1]["modelspec.trigger_phrase"] == "<t> star, <u> star"
    merged = adapted(tmp_path / "merged").pipeline()
    for name, token in (("a", "<t>"), ("b", "<u>")):
        own = adapted(tmp_path / name).pipeline()
        target = rows(own, f"{token} star")
        torch.testing.assert_close(values(merged.unet, target), values(own.unet, target), rtol=0, atol=1e-4)
    merge_concepts([tmp_path / "a", tmp_path / "b"], tmp_path / "again")
    assert (tmp_path / "again" / "delta.safetensors").read_bytes() == path.read_bytes()


def test_the_command_merges_with_prompts_of_ones_own(tiny_sd: Path, make: MakeRecipe, tmp_path: Path) -> None:
    concept(tmp_path / "a", tiny_sd, make, "<t>", 1)
    keep = tmp_path / "keep.txt"
    keep.write_text("a red star\n\na blue circle on sand\n", encoding="utf-8")
    asked = [str(tmp_path / "a"), "--out", str(tmp_path / "out"), "--prompt", "<t>", "--keep", str(keep)]
    done = CliRunner().invoke(app, ["merge-concepts", *asked], catch_exceptions=False)
    assert done.exit_code == 0
    assert "delta.safetensors" in done.output
    own, merged = adapted(tmp_path / "a").pipeline(), adapted(tmp_path / "out").pipeline()
    target = rows(own, "<t>")
    torch.testing.assert_close(values(merged.unet, target), values(own.unet, target), rtol=0, atol=1e-4)
    merge_concepts([tmp_path / "a"], tmp_path / "other", prompts=["<t>"])
    other, base = adapted(tmp_path / "other").pipeline(), fresh(tiny_sd)
    kept = base.encode_prompt(["a red star", "a blue circle on sand"], torch.device("cpu"), 1, False)[0].flatten(0, 1)

    def cost(pipeline: Any) -> float:
        return float((values(pipeline.unet, kept) - values(base.unet, kept)).square().sum())

    assert 0 < cost(merged) < cost(other), "of these prompts it changes less than one that kept others"
    keep.write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no prompts"):
        CliRunner().invoke(app, ["merge-concepts", *asked], catch_exceptions=False)


def test_the_closed_form_is_the_constrained_minimum() -> None:
    """Of all weights with the wanted outputs it changes those for K least: moving within them makes it worse."""

    def draw(name: str, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator(0, name), dtype=torch.float64)

    weight, k, t = draw("w", 5, 6), draw("k", 40, 6), draw("t", 2, 6)
    own = weight + draw("v", 5, 6)
    found = closed_form(weight, k, [t], [own])
    torch.testing.assert_close(found @ t.T, own @ t.T)

    def cost(one: Tensor) -> Tensor:
        return (k @ (one - weight).T).square().sum()

    free = torch.eye(6, dtype=torch.float64) - torch.linalg.pinv(t) @ t  # changes that leave t's outputs alone
    for number in range(5):
        assert cost(found + 0.1 * draw(f"d{number}", 5, 6) @ free) > cost(found)
    # the formula of the paper, letter for letter
    d = t @ torch.linalg.inv(k.T @ k)
    literal = weight + ((own @ t.T) - weight @ t.T) @ torch.linalg.inv(d @ t.T) @ d
    torch.testing.assert_close(found, literal, rtol=1e-6, atol=1e-6)


def test_what_cannot_be_merged_is_refused(
    tiny_sd: Path, make: MakeRecipe, recipe: MakeRecipe, tmp_path: Path, trained_full: Any
) -> None:
    concept(tmp_path / "a", tiny_sd, make, "<t>", 1)
    concept(tmp_path / "b", tiny_sd, make, "<t>", 2)
    out = tmp_path / "merged"
    with pytest.raises(UserError, match="teach the same word"):
        merge_concepts([tmp_path / "a", tmp_path / "b"], out)
    with pytest.raises(UserError, match="one for each"):
        merge_concepts([tmp_path / "a"], out, prompts=["<t>", "<u>"])
    family, adapter = trained_full
    chosen = recipe(adapter={"kind": "full"}, export={"formats": ["delta"]})
    export(adapter.weights(), family, chosen, tmp_path / "c")
    with pytest.raises(UserError, match="differ in text_encoder"):
        merge_concepts([tmp_path / "a", tmp_path / "c"], out)
    with pytest.raises(UserError, match="only weights that read the prompt"):
        merge_concepts([tmp_path / "c"], out)
    lora_family, lora = trained(tiny_sd, LORA)
    written(lora, lora_family, make(LORA), tmp_path / "d")
    with pytest.raises(UserError, match=r"holds no delta\.safetensors"):
        merge_concepts([tmp_path / "d"], out)
    assert not out.exists()
