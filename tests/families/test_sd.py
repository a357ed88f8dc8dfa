"""Stable Diffusion: every call equals what its pipeline does, and parts come and go one by one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.adapters.select import select
from finetune.batch import Conditioning
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import load_family
from finetune.families.sd import SD
from finetune.families.unet import linears
from finetune.randomness import generator

CAPTIONS = ["a large striped red star on grass", "", "a photo of a sksq star", "red " * 60]
GEOMETRY = torch.zeros(1, 6, dtype=torch.int64)


def load(folder: Path) -> SD:
    family = load_family(ModelConfig(path=str(folder)))
    assert isinstance(family, SD)
    return family


def pipeline(folder: Path) -> StableDiffusionPipeline:
    """Frozen like the family's networks: torch's ``linear`` takes another kernel for weights that may learn, even
    under ``no_grad``, whose last bit can differ.
    """
    loaded = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    for network in (loaded.unet, loaded.vae, loaded.text_encoder):
        network.requires_grad_(False)
    return loaded


@pytest.fixture(params=["tiny_sd", "tiny_sd_v"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def change_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# ---- the same numbers as the pipeline ----------------------------------------------------------------------------


def test_prompts_are_the_pipelines(folder: Path) -> None:
    family = load(folder)
    family.require("text_encoder")
    expected, _ = pipeline(folder).encode_prompt(CAPTIONS, "cpu", 1, False)
    assert torch.equal(family.encode_prompt(CAPTIONS).tokens, expected)


def test_answers_are_the_pipelines(folder: Path) -> None:
    """One sampling step is watched; asked the same, the family answers the same, bit for bit."""
    family, reference, seen = load(folder), pipeline(folder), {}
    family.require("denoiser", "text_encoder")

    def watch(_: nn.Module, args: tuple[Tensor, Tensor], kwargs: dict[str, Tensor], output: tuple[Tensor]) -> None:
        seen.update(noisy=args[0], time=args[1], tokens=kwargs["encoder_hidden_states"], answer=output[0])

    reference.unet.register_forward_hook(watch, with_kwargs=True)
    reference(CAPTIONS[0], num_inference_steps=1, guidance_scale=1.0, height=16, width=16, output_type="latent")
    prompt = family.encode_prompt(CAPTIONS[:1])
    assert torch.equal(prompt.tokens, seen["tokens"])
    answer = family.predict(seen["noisy"], seen["time"].expand(1), prompt, GEOMETRY)
    assert torch.equal(answer, seen["answer"])


def test_pictures_are_encoded_and_scaled_as_the_pipeline_decodes(folder: Path) -> None:
    family, reference = load(folder), pipeline(folder)
    family.require("vae")
    pixels = torch.rand(2, 3, 16, 16, generator=generator(0, "pixels")) * 2 - 1
    posterior = family.encode_image(pixels)
    with torch.no_grad():
        expected = reference.vae.encode(pixels).latent_dist
    assert torch.equal(posterior.mean, expected.mean)
    assert torch.equal(posterior.logvar, expected.logvar)
    assert not posterior.mean.requires_grad
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(posterior.sample(noise), expected.sample(torch.Generator().manual_seed(3)))
    scaled = family.scale(posterior.mean)
    torch.testing.assert_close(scaled / reference.vae.config.scaling_factor, posterior.mean)
    assert family.latent_scale == reference.vae_scale_factor == 16 // posterior.mean.shape[-1]


def test_scaling_honours_shift_mean_and_deviation(editable: Path) -> None:
    raw = torch.randn(2, 4, 3, 3, generator=generator(0, "raw"))
    change_json(editable / "vae/config.json", scaling_factor=0.5, shift_factor=0.25)
    torch.testing.assert_close(load(editable).scale(raw), (raw - 0.25) * 0.5)
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 4.0, 8.0]
    change_json(editable / "vae/config.json", latents_mean=mean, latents_std=std)
    by_channel = [(raw[:, c] - mean[c]) * 0.5 / std[c] for c in range(4)]
    torch.testing.assert_close(load(editable).scale(raw), torch.stack(by_channel, 1))


def test_the_own_pipeline_draws_the_same_picture(folder: Path) -> None:
    def draw(pipe: StableDiffusionPipeline) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        rng = torch.Generator().manual_seed(0)
        drawn = pipe(CAPTIONS[0], num_inference_steps=3, height=16, width=16, generator=rng, output_type="pt")
        return torch.as_tensor(drawn.images)

    family = load(folder)
    assert torch.equal(draw(family.pipeline()), draw(pipeline(folder)))
    assert family.pipeline().unet is family.networks["denoiser"]


def test_objective_is_the_schedulers(tiny_sd: Path, tiny_sd_v: Path) -> None:
    for folder, prediction in ((tiny_sd, "epsilon"), (tiny_sd_v, "v_prediction")):
        process = load(folder).process
        assert process.prediction == prediction
        assert torch.equal(process.alphas_cumprod, pipeline(folder).scheduler.alphas_cumprod)
        assert float(process.alphas_cumprod[0]) == pytest.approx(0.99915, abs=1e-5)


@pytest.mark.parametrize("kind", ["PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_objective_does_not_depend_on_the_sampler(tiny_sd: Path, editable: Path, kind: str) -> None:
    change_json(editable / "scheduler/scheduler_config.json", _class_name=kind)
    assert torch.equal(load(editable).process.alphas_cumprod, load(tiny_sd).process.alphas_cumprod)


@pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_epsilon_with_zero_terminal_snr_is_refused(editable: Path, kind: str) -> None:
    settings = editable / "scheduler/scheduler_config.json"
    change_json(settings, _class_name=kind, rescale_betas_zero_snr=True)
    with pytest.raises(UserError, match="zero terminal SNR"):
        load(editable)
    change_json(settings, prediction_type="v_prediction")
    load(editable)


def test_overflow_counts_what_the_pipeline_cuts(tiny_sd: Path) -> None:
    family = load(tiny_sd)  # no network in memory
    assert family.caption_overflow("a red star") == 0
    assert family.caption_overflow("red " * 22) == 0
    assert family.caption_overflow("red " * 23) == 1
    assert family.caption_overflow("red " * 60) == 38


# ---- parts in memory ---------------------------------------------------------------------------------------------


def test_parts_come_frozen_and_go(folder: Path) -> None:
    family = load(folder)
    assert len(family.networks) == 0
    family.require("vae", "text_encoder")
    family.require("vae")
    assert set(family.networks) == {"vae", "text_encoder"}
    assert not any(network.training for network in family.networks.values())
    assert not any(p.requires_grad for p in family.networks.parameters())
    family.release("vae", "denoiser")
    assert set(family.networks) == {"text_encoder"}


def test_a_half_precision_base_is_loaded_in_float32(editable: Path) -> None:
    file = editable / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    family = load(editable)
    family.require("denoiser")
    assert {p.dtype for p in family.networks.parameters()} == {torch.float32}


def test_fresh_copies_share_nothing(tiny_sd: Path) -> None:
    family = load(tiny_sd)
    family.require("denoiser")
    copy = family.fresh("denoiser")
    with torch.no_grad():
        for parameter in family.networks["denoiser"].parameters():
            parameter.add_(1)
    saved = load_file(tiny_sd / "unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(p, saved[name]) for name, p in copy.named_parameters())


def test_required_parts_are_put_on_the_device(tiny_sd: Path) -> None:
    family = load(tiny_sd)
    family.device = torch.device("meta")
    family.require("text_encoder")
    assert {p.device.type for p in family.networks.parameters()} == {"meta"}


def test_gradient_checkpointing_changes_no_gradient(tiny_sd: Path) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        family = load(tiny_sd)
        family.require("denoiser", "text_encoder")
        family.networks.requires_grad_(True).train()
        if checkpointing:
            family.enable_gradient_checkpointing()
            assert family.networks["denoiser"].is_gradient_checkpointing
            assert family.networks["text_encoder"].is_gradient_checkpointing
        noisy = torch.randn(1, 4, 8, 8, generator=generator(0, "noisy"))
        prompt = family.encode_prompt(CAPTIONS[:1])
        family.predict(noisy, torch.tensor([500]), prompt, GEOMETRY).square().mean().backward()
        return [p.grad for p in family.networks.parameters() if p.grad is not None]

    plain, saved = gradients(False), gradients(True)
    assert len(plain) == len(saved)
    for one, other in zip(plain, saved, strict=True):
        torch.testing.assert_close(one, other)


# ---- fingerprints ------------------------------------------------------------------------------------------------


def test_fingerprint_is_of_content_not_of_place(tiny_sd: Path, editable: Path) -> None:
    assert load(tiny_sd).fingerprint("vae", "text_encoder") == load(editable).fingerprint("text_encoder", "vae")


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("vae/diffusion_pytorch_model.safetensors", "vae"),
        ("vae/config.json", "vae"),
        ("text_encoder/model.safetensors", "text_encoder"),
        ("tokenizer/tokenizer.json", "text_encoder"),
        ("unet/diffusion_pytorch_model.safetensors", "denoiser"),
    ],
)
def test_fingerprint_follows_its_own_files_only(editable: Path, file: str, changed: str) -> None:
    parts = ("vae", "text_encoder", "denoiser")
    family = load(editable)
    before = {part: family.fingerprint(part) for part in parts}
    content = bytearray((editable / file).read_bytes())
    content[-1] ^= 1  # same size: the last weight, or the last bracket
    (editable / file).write_bytes(content)
    after = {part: family.fingerprint(part) for part in parts}
    assert {part for part in parts if before[part] != after[part]} == {changed}
    assert len(set(before.values())) == len(parts)


# ---- names -------------------------------------------------------------------------------------------------------


def test_exported_paths_are_those_of_other_tools(tiny_sd: Path) -> None:
    family = load(tiny_sd)
    family.require("text_encoder")
    names = family.export_names["text_encoder"]
    path = next(name for name, _ in family.networks["text_encoder"].named_modules() if name.endswith("q_proj"))
    whole = names.missing_level + path
    assert whole == "text_model.encoder.layers.0.self_attn.q_proj"
    assert f"{names.kohya}_{whole}".replace(".", "_") == "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    assert (family.export_names["denoiser"].kohya, family.export_names["denoiser"].diffusers) == ("lora_unet", "unet")


SD1 = {"cross_attention_dim": 768, "attention_head_dim": 8, "use_linear_projection": False}
SD2 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}


@pytest.mark.parametrize("architecture", [SD1, SD2], ids=["sd1", "sd2"])
@pytest.mark.parametrize(
    ("preset", "count"), [("attention", 128), ("cross-attention", 64), ("cross-kv", 32), ("wide", 192), ("conv", 278)]
)
def test_presets_reach_the_published_numbers_of_layers(architecture: dict, preset: str, count: int) -> None:
    """16 transformers of 12 layers each, 22 residual blocks: kohya's trainer counts 192, and 278 with convolutions."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, **architecture)
    names = [name for name, part in unet.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    match = "adapter.targets", preset, linears(["text_encoder"]), "denoiser", names
    assert len(select(*match, re.Pattern.fullmatch)) == count


def test_readers_are_the_layers_that_see_the_prompt(tiny_sd: Path) -> None:
    family = load(tiny_sd)
    family.require("denoiser")
    readers = [name for name, _ in family.networks["denoiser"].named_modules() if name.endswith(family.sites.readers)]
    assert len(readers) == 2 * 4
    tokens = torch.zeros(1, 24, 16, requires_grad=True)
    answer = family.predict(torch.ones(1, 4, 8, 8), torch.tensor([5]), Conditioning(tokens=tokens), GEOMETRY)
    answer.sum().backward()
    assert tokens.grad is not None
