"""Files with the keys of other trainers, against the changes that their own formulas make."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import UserError
from finetune.export.lycoris import Change
from finetune.export.tools.convert import convert
from finetune.export.tools.merge_into import merge_into
from finetune.export.tools.method import Method
from finetune.export.tools.source import Source
from finetune.randomness import generator

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONVOLUTION = "mid_block.resnets.0.conv1"


def drawn(name: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(0, name))


def written(path: Path, stem: str, parts: dict[str, torch.Tensor]) -> Path:
    save_file({f"{stem}.{part}": tensor for part, tensor in parts.items()}, path)
    return path


def tucker(t: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """As LyCORIS has it."""
    return torch.einsum("ijkl,jr,ip->prkl", t, b, a).contiguous()


def test_simpletuners_lokr(tiny_sd, tmp_path):
    """LyCORIS' own names: ``lycoris_`` before the module."""
    one, two = drawn("w1", 4, 4), drawn("w2", 4, 4)
    parts = {"lokr_w1": one, "lokr_w2": two, "alpha": torch.tensor(1e10)}
    path = written(tmp_path / "lokr.safetensors", f"lycoris_{ATTENTION.replace('.', '_')}", parts)
    made = convert(path, tmp_path / "k.safetensors", "kohya", base=str(tiny_sd))
    found = Source(made, str(tiny_sd)).get(f"denoiser.{ATTENTION}")
    assert isinstance(found, Change) and torch.equal(found.difference(), torch.kron(one, two)), "alpha has no part"
    assert all(key.startswith("lora_unet_") for key in load_file(made))


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_tuckers_decomposition_of_lycoris(method, tiny_sd, tmp_path):
    """A middle factor is multiplied in, and the model is changed by what LyCORIS' formula makes."""
    rank, alpha = 3, torch.tensor(1.5)
    if method == "loha":
        parts = {f"hada_w{n}_{side}": drawn(f"{n}{side}", rank, 16) for n in (1, 2) for side in "ab"}
        parts |= {f"hada_t{n}": drawn(f"t{n}", rank, rank, 3, 3) for n in (1, 2)}
        first, second = (tucker(parts[f"hada_t{n}"], parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"]) for n in (1, 2))
        wanted = first * second
    else:
        parts = {"lokr_w1": drawn("w1", 4, 2), "lokr_t2": drawn("t2", rank, rank, 3, 3)}
        parts |= {"lokr_w2_a": drawn("a", rank, 4), "lokr_w2_b": drawn("b", rank, 8)}
        second = tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
        wanted = torch.kron(parts["lokr_w1"][:, :, None, None], second)
    stem = f"lora_unet_{CONVOLUTION.replace('.', '_')}"
    path = written(tmp_path / "t.safetensors", stem, {**parts, "alpha": alpha})
    plain = convert(path, tmp_path / "plain.safetensors", "kohya", base=str(tiny_sd))
    assert not any(key.endswith(("_t1", "_t2")) for key in load_file(plain))
    for number, one in enumerate((path, plain)):
        made = merge_into([one], str(tiny_sd), tmp_path / f"m{number}", Method("concat", (1.0,)))
        name = Path("unet") / "diffusion_pytorch_model.safetensors"
        before, after = (load_file(folder / name)[f"{CONVOLUTION}.weight"] for folder in (tiny_sd, made.path))
        torch.testing.assert_close(after - before, 0.5 * wanted, rtol=1e-4, atol=1e-4)


def test_ai_toolkits_dora(tiny_sd, tmp_path):
    """PEFT's factors without an alpha, and lengths under a name of their own."""
    down, up, lengths = drawn("down", 2, 16), drawn("up", 16, 2), drawn("m", 16).abs()
    parts = {"lora_A.weight": down, "lora_B.weight": up, "magnitude": lengths}
    path = written(tmp_path / "dora.safetensors", f"unet.{ATTENTION}", parts)
    made = load_file(convert(path, tmp_path / "d.safetensors", "diffusers", base=str(tiny_sd)))
    assert torch.equal(made[f"unet.{ATTENTION}.lora_magnitude_vector.weight"], lengths)
    assert torch.equal(made[f"unet.{ATTENTION}.lora_A.weight"], down)


FLUX = {  # of one layer, where a trainer has it apart: queries of the first double block
    "lora_transformer_transformer_blocks_0_attn_to_q": "OneTrainer, before",
    "transformer.transformer_blocks.0.attn.to_q": "ai-toolkit, SimpleTuner, diffusers",
}


@pytest.mark.parametrize("stem", FLUX)
def test_flux_apart(stem, tmp_path):
    down, up = drawn("down", 2, 3072), drawn("up", 3072, 2)
    kohya = stem.startswith("lora_")
    ends = ("lora_down.weight", "lora_up.weight") if kohya else ("lora_A.weight", "lora_B.weight")
    path = written(tmp_path / "f.safetensors", stem, dict(zip(ends, (down, up), strict=True)))
    made = load_file(convert(path, tmp_path / "k.safetensors", "kohya"))
    whole = made["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
    assert torch.equal(whole[:3072], up) and not whole[3072:].any()


@pytest.mark.parametrize(
    "stem", ["lora_unet_double_blocks_0_img_attn_qkv", "diffusion_model.double_blocks.0.img_attn.qkv"]
)
def test_flux_together(stem, tmp_path):
    """As kohya's tools train it, and the same under ComfyUI's names: each layer gets its rows and all ranks."""
    down, up = drawn("down", 2, 3072), drawn("up", 3 * 3072, 2)
    kohya = stem.startswith("lora_")
    ends = ("lora_down.weight", "lora_up.weight") if kohya else ("lora_A.weight", "lora_B.weight")
    path = written(tmp_path / "f.safetensors", stem, dict(zip(ends, (down, up), strict=True)))
    made = load_file(convert(path, tmp_path / "d.safetensors", "diffusers"))
    for place, part in enumerate("qkv"):
        name = f"transformer.transformer_blocks.0.attn.to_{part}"
        product = made[f"{name}.lora_B.weight"] @ made[f"{name}.lora_A.weight"]
        torch.testing.assert_close(product, up[place * 3072 : (place + 1) * 3072] @ down)


@pytest.mark.parametrize("name", ["lora_te2", "lora_te3"])
def test_t5_of_flux_is_the_third_encoder_or_onetrainers_second(name, tmp_path):
    stem = f"{name}_encoder_block_0_layer_0_SelfAttention_q"
    factors = {"lora_down.weight": drawn("down", 2, 4096), "lora_up.weight": drawn("up", 4096, 2)}
    path = written(tmp_path / "t5.safetensors", stem, factors)
    double = "lora_unet_double_blocks_0_img_attn_proj"
    more = {f"{double}.lora_down.weight": drawn("d", 2, 3072), f"{double}.lora_up.weight": drawn("u", 3072, 2)}
    save_file({**load_file(path), **more}, path)
    assert set(Source(path)) == {
        "denoiser.transformer_blocks.0.attn.to_out.0",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
    }


@pytest.mark.parametrize(
    ("part", "words"),
    [("dora_scale", "DoRA of another method"), ("diff_b", "a trained bias"), ("w_norm", "a trained norm")],
)
def test_parts_without_a_place_are_named(part, words, tiny_sd, tmp_path):
    stem = f"lora_unet_{CONVOLUTION.replace('.', '_')}"
    parts = {"diff": drawn("diff", 16, 16, 3, 3), part: torch.ones(16)}
    path = written(tmp_path / "x.safetensors", stem, parts)
    with pytest.raises(UserError, match=rf"{stem}\.{part}' cannot be taken over: it is {words}"):
        convert(path, tmp_path / "no.safetensors", "kohya", base=str(tiny_sd))
