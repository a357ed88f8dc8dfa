"""Packed weights: how far from the true ones they are, what they take, and that what is on top of them trains."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.adapters import attach
from finetune.config.adapters import HypernetworkConfig, LohaConfig, LokrConfig, LoraConfig, OftConfig
from finetune.config.memory import Int8Config, Nf4Config
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.export.merge import merge
from finetune.families import load_family
from finetune.families.quantised import BLOCK, FORMATS, QuantisedLinear, quantise
from finetune.family import ModelFamily
from finetune.randomness import generator

BOUNDS = {"int8": 0.01, "fp8": 0.03, "nf4": 0.10}  # of normal weights, as a share of their norm
BYTES = {"int8": 1 + 4 / 256, "fp8": 1 + 4 / 256, "nf4": 0.5 + 4 / BLOCK}  # a weight, in rows of 256


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed, "weights"))


def layer(outputs: int = 48, inputs: int = 256, bias: bool = True) -> nn.Linear:
    made = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    made.weight.data = normal(outputs, inputs)
    return made


@pytest.mark.parametrize("name", FORMATS)
def test_unpacked_weights_are_near_the_true_ones_and_small_in_memory(name: str) -> None:
    weight = normal(48, 256)
    codes, scale = FORMATS[name].pack(weight)
    error = (FORMATS[name].unpack(codes, scale, weight.shape) - weight).norm() / weight.norm()
    assert 0 < error < BOUNDS[name]
    assert codes.nbytes + scale.nbytes == BYTES[name] * weight.numel()


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_format_can_hold_comes_back_bit_for_bit(name: str) -> None:
    weight = normal(6, 70)  # no whole number of blocks
    codes, scale = FORMATS[name].pack(weight)
    held = FORMATS[name].unpack(codes, scale, weight.shape)
    again = FORMATS[name].unpack(*FORMATS[name].pack(held), held.shape)
    torch.testing.assert_close(again, held, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_zeros_stay_zeros(name: str) -> None:
    weight = torch.zeros(3, BLOCK)
    assert torch.equal(FORMATS[name].unpack(*FORMATS[name].pack(weight), weight.shape), weight)


def test_every_weight_is_rounded_to_the_nearest_step_of_its_row() -> None:
    weight = normal(5, 64)
    codes, scale = FORMATS["int8"].pack(weight)
    assert (FORMATS["int8"].unpack(codes, scale, weight.shape) - weight).abs().le(scale / 2 * 1.001).all()


def test_nf4_takes_the_nearest_level_of_its_block() -> None:
    weight = normal(2, BLOCK)
    codes, scale = FORMATS["nf4"].pack(weight)
    levels = FORMATS["nf4"].unpack(
        torch.arange(0, 256, 17, dtype=torch.uint8).repeat(4), scale.new_ones(2, 1), torch.Size((32,))
    )[0::2]
    nearest = levels[(weight[..., None] / scale[..., None] - levels).abs().argmin(-1)] * scale
    assert torch.equal(FORMATS["nf4"].unpack(codes, scale, weight.shape), nearest)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_and_its_gradient_are_those_of_a_float_layer_with_the_same_weight(
    name: str, dtype: torch.dtype
) -> None:
    packed = QuantisedLinear(layer().to(dtype), name)
    inputs = [normal(2, 7, 256, seed=1).to(dtype).requires_grad_() for _ in range(2)]
    ours, theirs = packed(inputs[0]), F.linear(inputs[1], packed.weight, packed.bias)
    assert torch.equal(ours, theirs)
    for answer in (ours, theirs):
        answer.float().square().sum().backward()
    assert torch.equal(*(one.grad for one in inputs))  # type: ignore[arg-type]


def test_the_unpacked_weight_is_not_kept_for_the_backward_pass() -> None:
    packed, kept = QuantisedLinear(layer(), "int8"), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed(normal(2, 256).requires_grad_())
    assert sorted(map(str, kept)) == ["torch.float32", "torch.int8"]  # scale and codes


def test_the_true_weight_is_let_go() -> None:
    block = nn.ModuleDict({"a": layer()})
    true = weakref.ref(block["a"].weight)
    quantise({"block": block}, "nf4")
    gc.collect()
    assert true() is None


def test_layers_that_are_skipped_or_no_plain_linear_layers_stay() -> None:
    block = nn.ModuleDict({"a": layer(), "norm": nn.LayerNorm(4), "b": layer()})
    quantise({"blocks.0": block}, "int8", [r"\.0\.b$"])
    assert [type(part).__name__ for part in block.values()] == ["QuantisedLinear", "LayerNorm", "Linear"]


def family(folder: Path, **model: object) -> ModelFamily:
    torch.set_num_threads(1)
    return load_family(ModelConfig.model_validate({"path": str(folder), **model}))


def test_only_what_is_asked_for_is_packed(tiny_sd: Path) -> None:
    for quantize, wanted in (
        (Int8Config(kind="int8"), {"denoiser"}),
        (Nf4Config(kind="nf4", text_encoders=True), {"denoiser", "text_encoder"}),
    ):
        found = family(tiny_sd, quantize=quantize)
        found.require("denoiser", "text_encoder", "vae")
        packed = {
            n for n, part in found.networks.items() if any(isinstance(m, QuantisedLinear) for m in part.modules())
        }
        assert packed == wanted
        assert not any(isinstance(m, QuantisedLinear) for m in found.fresh("denoiser").modules())


def test_what_is_packed_has_other_entries_in_caches(tiny_sd: Path) -> None:
    plain, packed = family(tiny_sd), family(tiny_sd, quantize={"kind": "int8"})
    assert plain.fingerprint("denoiser") != packed.fingerprint("denoiser")
    assert plain.fingerprint("text_encoder", "vae") == packed.fingerprint("text_encoder", "vae")


ADAPTERS = [
    LoraConfig(kind="lora", rank=2, text_encoder=True),
    LoraConfig(kind="lora", rank=2, use_dora=True),
    LokrConfig(kind="lokr", rank=2),
    LohaConfig(kind="loha", rank=2),
    OftConfig(kind="oft", block_size=4),
    HypernetworkConfig(kind="hypernetwork", layers=[1, 2, 1]),
]


@pytest.mark.parametrize(
    "model",
    [
        {"quantize": {"kind": "nf4", "text_encoders": True}},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "quantize": {"kind": "int8"}},
    ],
    ids=["nf4", "bf16", "bf16-int8"],
)
@pytest.mark.parametrize("config", ADAPTERS, ids=lambda config: config.kind)
def test_every_method_trains_float32_weights_on_top(tiny_sd: Path, config: object, model: dict[str, object]) -> None:
    found = family(tiny_sd, **model)
    found.require("denoiser", "text_encoder")
    adapter = attach(config, found, 0)  # type: ignore[arg-type]
    trained = {name: one for group in adapter.groups() for name, one in group.parameters.items()}
    assert {one.dtype for one in trained.values()} == {torch.float32}

    def answer() -> Tensor:
        prompt = found.encode_prompt(["a red star"])
        said = found.predict(normal(1, 4, 8, 8), torch.tensor([300]), prompt, torch.zeros(1, 6))
        assert said.dtype == torch.float32
        return said

    with torch.no_grad(), adapter.disabled():
        before = answer()
    optimizer = torch.optim.Adam(trained.values(), lr=0.01)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = (answer() - before - 0.1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad(), adapter.disabled():
        assert torch.equal(answer(), before)  # the base has not moved


def test_nothing_is_added_to_a_packed_weight_in_silence(tiny_sd: Path) -> None:
    found = family(tiny_sd, quantize={"kind": "int8"})
    pipeline = found.pipeline()
    name, linear = next((n, m) for n, m in pipeline.unet.named_modules() if isinstance(m, QuantisedLinear))
    stem = f"lora_unet_{name.replace('.', '_')}"
    with pytest.raises(UserError, match="is quantised"):
        merge(pipeline, {f"{stem}.diff": torch.zeros(linear.out_features, linear.in_features)})
