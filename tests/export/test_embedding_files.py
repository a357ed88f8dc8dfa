"""Files of new words: what is in them, who reads them, and what is wrong with damaged ones (FORMATS 2, 3.4)."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.adapter import Weights
from finetune.adapters import attach
from finetune.adapters.embedding import Embedding
from finetune.config.adapters import EmbeddingConfig
from finetune.config.schema import ModelConfig, Recipe, SamplerConfig
from finetune.errors import GuardError, UserError
from finetune.export import export, identify, pieces, read, verify
from finetune.export.pickles import write_pickle
from finetune.export.sample import sample
from finetune.families import load_family
from finetune.family import ModelFamily
from finetune.randomness import generator

MakeRecipe = Callable[..., Recipe]
TOKENS = [{"token": "<zib>", "vectors": 3, "initializer": "star"}, {"token": "<dax>"}]
PROMPTS = ["a photo of a <zib> on grass", "<zib> <zib>", "a star"]


def learned(folder: Path, *tokens: dict[str, Any]) -> tuple[ModelFamily, Embedding]:
    family = load_family(ModelConfig(path=str(folder)))
    config = EmbeddingConfig.model_validate({"kind": "embedding", "tokens": list(tokens) or TOKENS[:1]})
    adapter = attach(config, family, seed=0)
    assert isinstance(adapter, Embedding)
    with torch.no_grad():
        for name, parameter in adapter.groups()[0].parameters.items():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator(1, name))
    return family, adapter


@pytest.fixture
def embedding_recipe(recipe: MakeRecipe) -> MakeRecipe:
    def make(*tokens: dict[str, Any], **sections: Any) -> Recipe:
        adapter = {"kind": "embedding", "tokens": list(tokens) or TOKENS[:1]}
        return recipe(recipe="textual_inversion", adapter=adapter, **sections)

    return make


def loaded(folder: Path, *files: Path) -> Any:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    for file in files:
        pipeline.load_textual_inversion(str(file))
    return pipeline


def encoded(pipeline: Any, prompts: list[str]) -> torch.Tensor:
    return pipeline.encode_prompt(prompts, torch.device("cpu"), 1, False)[0]


@pytest.mark.parametrize("name", ["learned_embeds.safetensors", "zib.safetensors", "zib.pt"])
def test_diffusers_reads_every_file_bit_for_bit(
    name: str, tiny_sd: Path, embedding_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """METHODS 2.9: save and load in both formats reproduces prompt embeddings; load_textual_inversion reads them."""
    family, adapter = learned(tiny_sd)
    recipe = embedding_recipe()
    written = export(adapter.weights(), family, recipe, tmp_path)
    assert [path.name for path in written] == ["learned_embeds.safetensors", "zib.safetensors", "zib.pt"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == sorted(path.name for path in written)
    wanted = family.encode_prompt(PROMPTS).tokens
    assert torch.equal(encoded(loaded(tiny_sd, tmp_path / name), PROMPTS), wanted)
    assert read(tmp_path / name, family.export_names).tensors.keys() == adapter.weights().tensors.keys()
    found = verify(tmp_path / name, base=recipe.model.path, weights=adapter.weights())
    assert found.passed, str(found)
    assert "ok    diffusers: prompt encoding: equal bit for bit" in str(found)
    assert "ok    equal to memory" in str(found)


def test_what_is_in_the_files(tiny_sd: Path, embedding_recipe: MakeRecipe, tmp_path: Path) -> None:
    """FORMATS 2: one key, the placeholder; A1111's own keys, plain values; the header that FORMATS names."""
    family, adapter = learned(tiny_sd)
    export(adapter.weights(), family, embedding_recipe(train={"steps": 7}), tmp_path)
    (rows,) = adapter.weights().tensors.values()
    for name, layout in (("learned_embeds", "diffusers"), ("zib", "a1111")):
        path = tmp_path / f"{name}.safetensors"
        tensors = load_file(path)
        assert list(tensors) == ["<zib>"] and torch.equal(tensors["<zib>"], rows)
        with safe_open(path, "pt") as file:
            header = file.metadata()
        assert header["finetune.kind"] == "embedding" and header["finetune.layout"] == layout
        assert header["modelspec.architecture"] == "stable-diffusion-custom/textual-inversion"
        assert header["modelspec.trigger_phrase"] == header["finetune.token"] == "<zib>"
        assert header["modelspec.is_negative_embedding"] == "false"
        assert header["finetune.vectors"] == "3" and header["finetune.steps"] == "7"
    content = torch.load(tmp_path / "zib.pt", weights_only=True)
    assert content.keys() == {
        "string_to_token",
        "string_to_param",
        "name",
        "step",
        "sd_checkpoint",
        "sd_checkpoint_name",
    }
    assert content["string_to_token"] == {"*": 265} and content["name"] == "<zib>" and content["step"] == 7
    assert type(content["string_to_param"]["*"]) is torch.Tensor and torch.equal(content["string_to_param"]["*"], rows)


def test_a1111_accepts_the_archive(tiny_sd: Path, embedding_recipe: MakeRecipe, tmp_path: Path) -> None:
    """FORMATS 3.4: only data.pkl, version and data/<n>; equal runs write equal bytes."""
    family, adapter = learned(tiny_sd)
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        export(adapter.weights(), family, embedding_recipe(), folder)
    with zipfile.ZipFile(tmp_path / "one" / "zib.pt") as archive:
        assert set(archive.namelist()) == {"archive/data.pkl", "archive/version", "archive/data/0"}
    for name in ("learned_embeds.safetensors", "zib.safetensors", "zib.pt"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_files_of_half_precision(dtype: str, tiny_sd: Path, embedding_recipe: MakeRecipe, tmp_path: Path) -> None:
    family, adapter = learned(tiny_sd)
    for path in export(adapter.weights(), family, embedding_recipe(export={"dtype": dtype}), tmp_path):
        (tensor,) = read(path, family.export_names).tensors.values()
        assert tensor.dtype == getattr(torch, dtype)
        found = verify(path, weights=adapter.weights())
        assert found.passed, str(found)


@pytest.mark.parametrize(
    ("formats", "names"),
    [(["diffusers"], ["learned_embeds.safetensors"]), (["a1111"], ["zib.safetensors", "zib.pt"])],
)
def test_only_the_layouts_that_are_asked_for(
    formats: list[str], names: list[str], tiny_sd: Path, embedding_recipe: MakeRecipe, tmp_path: Path
) -> None:
    family, adapter = learned(tiny_sd)
    written = export(adapter.weights(), family, embedding_recipe(export={"formats": formats}), tmp_path)
    assert [path.name for path in written] == names
    assert [piece.path.name for piece in pieces(tmp_path)] == names[:1]


def test_several_words_are_several_files_and_all_are_drawn_with(
    tiny_sd: Path, embedding_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """FORMATS 2: a key is a token; diffusers reads one a file."""
    family, adapter = learned(tiny_sd, *TOKENS)
    written = export(adapter.weights(), family, embedding_recipe(*TOKENS), tmp_path)
    names = [f"{stem}.{suffix}" for stem in ("learned_embeds-zib", "zib") for suffix in ("safetensors",)]
    assert {path.name for path in written} == {
        *names,
        "zib.pt",
        "learned_embeds-dax.safetensors",
        "dax.safetensors",
        "dax.pt",
    }
    found = pieces(tmp_path)
    assert {piece.path.name for piece in found} == {"learned_embeds-dax.safetensors", "learned_embeds-zib.safetensors"}
    prompts = ["a <dax> <zib>"]
    pipeline = loaded(tiny_sd, *(piece.path for piece in found))
    assert torch.equal(encoded(pipeline, prompts), family.encode_prompt(prompts).tokens)
    for path in written:
        assert verify(path, base=str(tiny_sd), weights=adapter.weights()).passed


def test_sampling_is_what_diffusers_draws(tiny_sd: Path, embedding_recipe: MakeRecipe, tmp_path: Path) -> None:
    """``finetune sample`` with a folder or a file, strength 1 alone."""
    family, adapter = learned(tiny_sd)
    export(adapter.weights(), family, embedding_recipe(), tmp_path)
    sampler = SamplerConfig(steps=2, guidance=2.0)
    pictures = [
        sample(path, PROMPTS[:1], base=str(tiny_sd), sampler=sampler, resolution=16)[0].tobytes()
        for path in (tmp_path, tmp_path / "zib.pt")
    ]
    pipeline = loaded(tiny_sd, tmp_path / "learned_embeds.safetensors")
    wanted = pipeline(
        PROMPTS[0],
        num_inference_steps=2,
        guidance_scale=2.0,
        height=16,
        width=16,
        generator=generator(0, "sample", 0, 0),
    ).images[0]
    assert pictures == [wanted.tobytes()] * 2
    with pytest.raises(UserError, match=r"strength 0\.5 is for other adapters"):
        sample(tmp_path, PROMPTS, base=str(tiny_sd), strength=0.5)


def test_a_word_that_the_base_knows_cannot_be_loaded(tiny_sd: Path, tmp_path: Path) -> None:
    save_file({"star</w>": torch.ones(1, 16)}, tmp_path / "star.safetensors")
    with pytest.raises(UserError, match=r"does not fit the base: Token star</w> already in"):
        sample(tmp_path / "star.safetensors", ["a star"], base=str(tiny_sd))


@pytest.mark.parametrize("name", ["bad.pt", "bad.safetensors"])
@pytest.mark.parametrize("content", ["words of others", "one axis"])
def test_files_of_other_tools(name: str, content: str, tiny_sd: Path, tmp_path: Path) -> None:
    """FORMATS 2: kohya's ``emb_params`` and one-axis tensors are read; the word is then the name of the file."""
    rows = torch.randn(2, 16, generator=generator(0, "rows")) if content == "words of others" else torch.ones(16)
    path = tmp_path / name
    if path.suffix == ".pt":
        facts = {"sd_checkpoint": "0123abcd", "sd_checkpoint_name": "v1-5-pruned"}
        write_pickle(
            path, {"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": "bad", "step": 1, **facts}
        )
    else:
        save_file({"emb_params": rows}, path)
    assert identify(path).kind == "embedding"
    found = verify(path, base=str(tiny_sd))
    assert found.passed, str(found)
    assert sample(path, ["a bad star"], base=str(tiny_sd), sampler=SamplerConfig(steps=1), resolution=16)


def damaged(weights: Weights, change: Callable[[torch.Tensor], torch.Tensor], **settings: str) -> Weights:
    tensors = {key: change(value.clone()) for key, value in weights.tensors.items()}
    return replace(weights, tensors=tensors, settings={**weights.settings, **settings})


def test_nothing_learned_is_not_written(tiny_sd: Path, embedding_recipe: MakeRecipe, tmp_path: Path) -> None:
    family = load_family(ModelConfig(path=str(tiny_sd)))
    adapter = attach(EmbeddingConfig.model_validate({"kind": "embedding", "tokens": TOKENS[:1]}), family, seed=0)
    with pytest.raises(GuardError, match="'<zib>' is where it began"):
        export(adapter.weights(), family, embedding_recipe(), tmp_path)
    assert not list(tmp_path.glob("*.*"))


def test_numbers_that_are_not_finite_are_not_written(
    tiny_sd: Path, embedding_recipe: MakeRecipe, tmp_path: Path
) -> None:
    family, adapter = learned(tiny_sd)
    with pytest.raises(GuardError, match="NaN or infinite"):
        export(damaged(adapter.weights(), lambda rows: rows / 0), family, embedding_recipe(), tmp_path)


@pytest.mark.parametrize("name", ["learned_embeds.safetensors", "zib.pt"])
@pytest.mark.parametrize(
    ("what", "failed"),
    [
        ("other numbers", "equal to memory"),
        ("nan", "finite"),
        ("initial", "base"),
        ("width", "base"),
        ("two keys", "readable"),
        ("cut", "readable"),
    ],
)
def test_damage_is_found(
    name: str, what: str, failed: str, tiny_sd: Path, embedding_recipe: MakeRecipe, tmp_path: Path
) -> None:
    family, adapter = learned(tiny_sd)
    export(adapter.weights(), family, embedding_recipe(), tmp_path)
    path = tmp_path / name
    (rows,) = adapter.weights().tensors.values()
    table = family.networks["text_encoder"].get_input_embeddings().weight.detach()
    changed = {
        "other numbers": rows + 1e-6,
        "nan": rows / 0,
        "initial": torch.cat([rows[:2], table[5:6]]),
        "width": rows[:, :8],
    }.get(what, rows)
    if what == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif path.suffix == ".pt":
        content = torch.load(path, weights_only=True)
        content["string_to_param"] = {"*": changed.contiguous()}
        if what == "two keys":
            content["string_to_words"] = content.pop("string_to_param")
        write_pickle(path, content)
    else:
        tensors = {"<zib>": changed.contiguous()}
        save_file(tensors | ({"<dax>.b": rows.clone()} if what == "two keys" else {}), path)
    weights = adapter.weights() if what == "other numbers" else None
    found = verify(path, base=str(tiny_sd), weights=weights)
    assert [check.name for check in found.checks if not check.passed][:1] == [failed], str(found)


def test_another_trainer_s_archive_is_told_of(tiny_sd: Path, tmp_path: Path) -> None:
    """FORMATS 3.4: torch's own zip is refused by A1111's check, so verify says so."""
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(1, 16)}, "name": "q", "step": 1}
    torch.save(content, tmp_path / "q.pt")
    found = verify(tmp_path / "q.pt", base=str(tiny_sd))
    assert [check.name for check in found.checks if not check.passed] == ["archive"]


def test_the_header_says_how_far_the_word_moved(tiny_sd: Path, embedding_recipe: MakeRecipe, tmp_path: Path) -> None:
    family, adapter = learned(tiny_sd)
    weights = adapter.weights()
    still = replace(weights, settings={**weights.settings, "moved": json.dumps({"text_encoder.<zib>": 0.0})})
    export(weights, family, embedding_recipe(), tmp_path)
    path = tmp_path / "learned_embeds.safetensors"
    assert "from where it began" in str(verify(path))
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(load_file(path), path, {**header, "finetune.settings": json.dumps(still.settings)})
    assert [check.name for check in verify(path).checks if not check.passed] == ["learned"]
