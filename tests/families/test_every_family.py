"""What holds for every family: it asks its denoiser exactly what the published pipeline asks."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.adapters import attach
from finetune.blocks import blocks_of
from finetune.config.adapters import EmbeddingConfig
from finetune.config.schema import ModelConfig
from finetune.families import families, load_family
from finetune.families.single_file.layouts import layout_of
from finetune.family import ModelFamily, writable
from finetune.randomness import generator

CAPTIONS = ["a large striped red star on grass", "a photo of a sksq star"]
SIZES = [(32, 32), (32, 64)]  # height and width of a twin's pictures, pixels


@pytest.fixture(scope="module", params=sorted(families()))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight twin of the family."""
    tiny: Callable[[Path], Path] = sys.modules[families()[request.param].__module__].tiny  # type: ignore[attr-defined]
    return tiny(tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture
def family(folder: Path) -> ModelFamily:
    return load_family(ModelConfig(path=str(folder)))


def flat(value: Any) -> list[Tensor]:
    """The tensors in nested arguments, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in flat(part)]


class Watched:
    """What a denoiser was asked first and what it answered."""

    def __init__(self, network: nn.Module) -> None:
        self.calls: list[tuple[dict[str, Any], Tensor]] = []
        network.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, network: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        names = list(inspect.signature(network.forward).parameters)
        asked = {**dict(zip(names, args, strict=False)), **kwargs}
        self.calls.append((asked, flat(output)[0]))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_denoiser_is_asked_what_the_pipeline_asks(family: ModelFamily, height: int, width: int) -> None:
    family.require(*family.text_encoders, "denoiser", "vae")
    pipeline: Any = family.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    channels = family.latent_channels
    cells = (height // family.latent_scale, width // family.latent_scale)
    noise = torch.randn(1, channels, *cells, generator=generator(0, "noise"))
    watched = Watched(family.networks["denoiser"])
    with torch.no_grad():
        pipeline(
            prompt=CAPTIONS[0],
            height=height,
            width=width,
            latents=PACKED.get(family.name, lambda _, latents: latents)(pipeline, noise),
            **family.guided(1.0),
            num_inference_steps=1,
            output_type="latent",
        )
        geometry = torch.tensor([[height, width, 0, 0, height, width]])
        time = pipeline.scheduler.timesteps[:1]
        answer = family.predict(noise, time, family.encode_prompt(CAPTIONS[:1]), geometry)
    (theirs, told), (ours, said) = watched.calls
    for name in sorted(theirs.keys() | ours.keys()):
        expected, found = flat(theirs.get(name)), flat(ours.get(name))
        assert len(expected) == len(found), name
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one.expand_as(other), other), name
    assert torch.equal(told, said)
    assert answer.shape == noise.shape


def in_patches(pipeline: Any, latents: Tensor) -> Tensor:
    """As the pipeline itself packs them."""
    return pipeline._pack_latents(latents, *latents.shape)  # type: ignore[no-any-return]


PACKED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "flux": in_patches,
    "flux2-dev": lambda pipeline, latents: pipeline._patchify_latents(latents),
    "flux2-klein": lambda pipeline, latents: pipeline._patchify_latents(latents),
    "qwen-image": in_patches,
}
"""Families whose pipelines want latents in another shape."""


def test_a_prompt_does_not_depend_on_its_neighbours(family: ModelFamily) -> None:
    family.require(*family.text_encoders)
    with torch.no_grad():
        both = family.encode_prompt(CAPTIONS)
        alone = [family.encode_prompt([caption]) for caption in CAPTIONS]
    for index, one in enumerate(alone):
        torch.testing.assert_close(both.rows(torch.tensor([index])).tokens, one.tokens)


def test_every_preset_finds_layers(family: ModelFamily) -> None:
    import re

    family.require("denoiser", *family.text_encoders)
    for table in (family.sites.linears, family.sites.selections):
        for preset, networks in table.items():
            for network, patterns in networks.items():
                module = family.networks[network]
                names = [name for name, _ in (*module.named_modules(), *module.named_parameters())]
                for pattern in patterns:
                    assert any(re.search(pattern, name) for name in names), (preset, network, pattern)


def test_gradient_checkpointing_changes_no_gradient(folder: Path) -> None:
    found = []
    for checkpointing in (False, True):
        family = load_family(ModelConfig(path=str(folder)))
        family.require("denoiser", *family.text_encoders)
        if checkpointing:
            family.enable_gradient_checkpointing()
        family.networks.train()
        trained = [family.networks[name] for name in ("denoiser", *family.sites.text_encoders)]
        parameters = [weight for network in trained for weight in network.parameters()]
        for weight in parameters:
            weight.requires_grad_(True)
        noisy = torch.randn(2, family.latent_channels, 8, 8, generator=generator(0, "noisy"))
        prompt, geometry = family.encode_prompt(CAPTIONS), torch.tensor([[16, 16, 0, 0, 16, 16]] * 2)
        family.predict(noisy, torch.tensor([300, 700]), prompt, geometry).square().mean().backward()
        found.append([weight.grad for weight in parameters if weight.grad is not None])
    assert len(found[0]) == len(found[1])
    for plain, frugal in zip(*found, strict=True):
        torch.testing.assert_close(plain, frugal)


def test_a_new_word_of_several_tokens_is_read_alike(family: ModelFamily) -> None:
    """What training makes of a word is what the pipeline makes of it, in every text encoder."""
    words = {"kind": "embedding", "tokens": [{"token": "<zib>", "initializer": "star red", "vectors": 2}]}
    attach(EmbeddingConfig.model_validate(words), family, seed=0)
    text = "a photo of a <zib> on grass"
    assert family.caption_overflow(text) == 0
    pipeline: Any = family.pipeline()
    known = inspect.signature(pipeline.encode_prompt).parameters
    asked = {"prompt": text, "prompt_2": None, "prompt_3": None, "device": "cpu", "num_images_per_prompt": 1}
    with torch.no_grad():
        found = family.encode_prompt([text])
        others = family.encode_prompt(["a photo of a star on grass"])
        asked["do_classifier_free_guidance"] = False
        got = pipeline.encode_prompt(**{name: value for name, value in asked.items() if name in known})
    assert any(torch.equal(found.tokens[0], one.squeeze(0)) for one in flat(got))
    assert not torch.equal(found.tokens, others.tokens[:, : found.tokens.shape[1]])


def test_a_new_word_is_at_first_what_it_was_made_of(family: ModelFamily) -> None:
    """And prompts without it stay what they were: a table may do more than to hold rows."""
    texts = ["a photo of a star on grass", "a photo of a red star on grass"]
    family.require(*family.text_encoders)
    with torch.no_grad():
        before = family.encode_prompt(texts)
        words = {"kind": "embedding", "tokens": [{"token": "<zib>", "initializer": "red star", "vectors": 2}]}
        attach(EmbeddingConfig.model_validate(words), family, seed=0)
        after = family.encode_prompt([*texts, "a photo of a <zib> on grass"])
    for name, tensor in before.tensors.items():
        for row in (0, 1):
            assert torch.equal(after.tensors[name][row], tensor[row])
        torch.testing.assert_close(after.tensors[name][2], tensor[1])


def test_every_row_of_blocks_is_known(family: ModelFamily) -> None:
    """What is packed and swapped: blocks of transformers lie in lists, and a U-Net's around its attention."""
    family.require("denoiser")
    denoiser = family.networks["denoiser"]
    blocks = blocks_of(denoiser)
    rows = {name for name, part in denoiser.named_children() if isinstance(part, nn.ModuleList)}
    if family.components["denoiser"] == "unet":
        rows = {
            name.partition(".attn")[0] for name, _ in denoiser.named_modules() if name.endswith((".attn1", ".attn2"))
        }
    assert rows
    assert {row for row in rows if not any(name == row or name.startswith(f"{row}.") for name in blocks)} == set()


def test_the_denoiser_answers_alike_however_it_lies_in_memory(folder: Path) -> None:
    found = []
    for held in ({}, {"block_swap": 99}, {"dtype": "bfloat16", "quantize": {"kind": "int8", "text_encoders": True}}):
        family = load_family(ModelConfig(path=str(folder), **held))
        family.require("denoiser", *family.text_encoders)
        noisy = torch.randn(1, family.latent_channels, 8, 8, generator=generator(0, "noisy"))
        with torch.no_grad():
            prompt, geometry = family.encode_prompt(CAPTIONS[:1]), torch.tensor([[16, 16, 0, 0, 16, 16]])
            found.append(family.predict(noisy, torch.tensor([500.0]), prompt, geometry))
    plain, swapped, packed = found
    assert torch.equal(swapped, plain)
    assert packed.dtype == torch.float32 and 0 < (packed - plain).norm() < 0.03 * plain.norm()


def test_networks_are_frozen_and_quiet(family: ModelFamily) -> None:
    family.require("denoiser", "vae", *family.text_encoders)
    assert not any(parameter.requires_grad for parameter in family.networks.parameters())
    assert not any(module.training for network in family.networks.values() for module in network.modules())


def test_a_family_says_whether_its_models_are_written_as_one_file(family: ModelFamily, folder: Path) -> None:
    """So that a recipe is refused before anything is trained."""
    assert bool(writable(("single-file",), family.export_names)) == (layout_of(folder) is not None)
