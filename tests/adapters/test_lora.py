"""LoRA: what it adds, what it leaves alone, and what it says of itself."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from finetune.adapters import attach
from finetune.adapters.lora import Lora
from finetune.batch import Conditioning
from finetune.config.adapters import LoraConfig
from finetune.config.optimizer import AdamWConfig
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import load_family
from finetune.family import ModelFamily
from finetune.randomness import generator
from finetune.train.optimizers import build_optimizer, set_rates

GEOMETRY = torch.zeros(2, 6, dtype=torch.int64)


def config(**changes: object) -> LoraConfig:
    return LoraConfig(**{"kind": "lora", "rank": 4, **changes})


def attached(folder: Path, seed: int = 0, **changes: object) -> tuple[ModelFamily, Lora]:
    family = load_family(ModelConfig(path=str(folder)))
    adapter = attach(config(**changes), family, seed)
    assert isinstance(adapter, Lora)
    return family, adapter


def question() -> tuple[Tensor, Tensor]:
    rng = generator(0, "question")
    return torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 24, 16, generator=rng)


def answer(family: ModelFamily) -> Tensor:
    noisy, tokens = question()
    return family.predict(noisy, torch.tensor([10, 700]), Conditioning(tokens=tokens), GEOMETRY)


def randomise(adapter: Lora, std: float = 0.3) -> None:
    """As after training: no factor is zero."""
    with torch.no_grad():
        for group in adapter.groups():
            for name, parameter in group.parameters.items():
                parameter.copy_(torch.randn(parameter.shape, generator=generator(1, name)) * std)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("targets", ["attention", "conv"])
def test_nothing_changes_before_training(tiny_sd: Path, targets: str, use_rslora: bool) -> None:
    family = load_family(ModelConfig(path=str(tiny_sd)))
    family.require("denoiser", "text_encoder")
    before, prompt = answer(family), family.encode_prompt(["a red star"]).tokens
    attach(config(targets=targets, use_rslora=use_rslora, text_encoder=True), family, 0)
    assert torch.equal(answer(family), before)
    assert torch.equal(family.encode_prompt(["a red star"]).tokens, prompt)


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 6 / 4), (True, 6 / math.sqrt(4))])
def test_change_is_scale_times_b_a_x(tiny_sd: Path, use_rslora: bool, scale: float) -> None:
    _, adapter = attached(tiny_sd, alpha=6.0, use_rslora=use_rslora)
    randomise(adapter)
    tensors = adapter.weights().tensors
    for name, layer in adapter.layers.items():
        x = torch.randn(3, layer.in_features, generator=generator(0, name))
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        change = layer(x) - layer.get_base_layer()(x)
        torch.testing.assert_close(change, scale * x @ a.T @ b.T, rtol=1e-5, atol=1e-6)
        assert tensors[f"{name}.alpha"] / 4 == pytest.approx(scale)
        with adapter.scaled(0.5):
            torch.testing.assert_close(layer(x) - layer.get_base_layer()(x), change / 2, rtol=1e-5, atol=1e-6)
        assert torch.equal(layer(x) - layer.get_base_layer()(x), change)


def test_strength_zero_and_disabled_are_the_base(tiny_sd: Path) -> None:
    family = load_family(ModelConfig(path=str(tiny_sd)))
    family.require("denoiser")
    before = answer(family)
    adapter = attach(config(), family, 0)
    assert isinstance(adapter, Lora)
    randomise(adapter)
    trained = answer(family)
    assert not torch.equal(trained, before)
    with adapter.scaled(0.0):
        assert torch.equal(answer(family), before)
    with adapter.disabled():
        assert torch.equal(answer(family), before)
    assert torch.equal(answer(family), trained)
    assert all(p.requires_grad for group in adapter.groups() for p in group.parameters.values())


def test_only_factors_learn(tiny_sd: Path) -> None:
    family, adapter = attached(tiny_sd, targets="conv", text_encoder=True)
    base = {name: p.clone() for name, p in family.networks.named_parameters() if "lora_" not in name}
    parameters = {name: p for group in adapter.groups() for name, p in group.parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.1)
    noisy, _ = question()
    for step in range(5):
        prompt = family.encode_prompt(["a red star", "a photo"])
        family.predict(noisy, torch.tensor([10, 700]), prompt, GEOMETRY).square().mean().backward()
        with_gradient = {id(p) for p in family.networks.parameters() if p.grad is not None}
        assert with_gradient == {id(p) for p in parameters.values()}
        for name, parameter in parameters.items():
            moving = bool(parameter.grad.abs().sum() > 0)
            # B is zero at first, so A cannot feel anything yet
            assert moving == (step > 0 or ".lora_B." in name) or step > 0, name
        optimizer.step()
        optimizer.zero_grad()
    after = dict(family.networks.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in base.items())
    assert all(bool(p.abs().sum() > 0) for p in parameters.values())


def test_every_factor_feels_the_loss_after_one_step(tiny_sd: Path) -> None:
    family, adapter = attached(tiny_sd, text_encoder=True)
    randomise(adapter)
    noisy, _ = question()
    prompt = family.encode_prompt(["a red star", "a photo"])
    family.predict(noisy, torch.tensor([10, 700]), prompt, GEOMETRY).square().mean().backward()
    for group in adapter.groups():
        assert all(bool(p.grad.abs().sum() > 0) for p in group.parameters.values())


def test_factors_are_float32_on_a_half_base(tiny_sd: Path) -> None:
    family = load_family(ModelConfig(path=str(tiny_sd)))
    family.require("denoiser")
    family.networks["denoiser"].to(torch.bfloat16)
    adapter = attach(config(), family, 0)
    assert {p.dtype for group in adapter.groups() for p in group.parameters.values()} == {torch.float32}


@pytest.mark.parametrize("targets", ["attention", "conv"])
def test_merged_answers_alike_and_restores_the_base(tiny_sd: Path, targets: str) -> None:
    family, adapter = attached(tiny_sd, targets=targets, alpha=2.0)
    randomise(adapter, std=0.1)
    base = {name: layer.get_base_layer().weight.clone() for name, layer in adapter.layers.items()}
    unmerged = answer(family)
    with adapter.merged():
        torch.testing.assert_close(answer(family), unmerged, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(layer.get_base_layer().weight, base[name]) for name, layer in adapter.layers.items())
    assert torch.equal(answer(family), unmerged)


def test_convolution_delta_is_the_closed_form(tiny_sd: Path) -> None:
    _, adapter = attached(tiny_sd, targets=[r"mid_block\.resnets\.0\.conv1"], alpha=2.0)
    randomise(adapter)
    (name, layer), tensors = next(iter(adapter.layers.items())), adapter.weights().tensors
    a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    assert a.shape == (4, 16, 3, 3)
    assert b.shape == (16, 4, 1, 1)
    delta = tensors[f"{name}.alpha"] / 4 * torch.einsum("or,rikl->oikl", b[:, :, 0, 0], a)
    x = torch.randn(1, 16, 5, 5, generator=generator(0, "x"))
    expected = nn.functional.conv2d(x, layer.get_base_layer().weight + delta, layer.get_base_layer().bias, padding=1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


# the twin: 4 transformer blocks (1 down, 2 up, 1 mid); 8 residual blocks (2 down, 4 up, 2 mid); 4 shortcuts (up)
@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("attention", 4 * 8),
        ("cross-attention", 4 * 4),
        ("cross-kv", 4 * 2),
        ("wide", 4 * (8 + 2 + 2)),
        ("conv", 4 * 12 + 8 * 3 + 4 + 2),
        (["cross-kv", r"conv_in"], 4 * 2 + 1),
        (r"mid_block\..*\.to_q", 2),
    ],
)
def test_presets_and_patterns_reach_what_they_name(tiny_sd: Path, targets: str | list[str], count: int) -> None:
    family, adapter = attached(tiny_sd, targets=targets)
    assert len(adapter.layers) == count
    injected = {name for name, _ in family.networks.named_modules() if name.endswith(".lora_A.default")}
    assert injected == {f"{name}.lora_A.default" for name in adapter.layers}


def test_text_encoder_layers_have_their_own_rate(tiny_sd: Path) -> None:
    _, adapter = attached(tiny_sd, text_encoder=True, text_encoder_learning_rate=1e-6)
    denoiser, encoder = adapter.groups()
    assert (denoiser.name, denoiser.learning_rate) == ("denoiser", None)
    assert (encoder.name, encoder.learning_rate) == ("text_encoder", 1e-6)
    assert len(encoder.parameters) == 2 * 4 * 2
    assert adapter.networks() == {"denoiser", "text_encoder"}
    assert attached(tiny_sd)[1].networks() == {"denoiser"}


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("atention", "did you mean 'attention'"),
        (["attention", "nothing_here"], "'nothing_here'"),
        ("to_q", "try '.*to_q'"),
        (r".*\.to_qq", "did you mean 'to_q'"),
        ("down_blocks.0", "down_blocks.0"),
        ("(", "no regular expression"),
    ],
)
def test_a_target_that_matches_nothing_is_named(tiny_sd: Path, targets: str | list[str], said: str) -> None:
    with pytest.raises(UserError, match=r"^adapter\.targets: ") as caught:
        attached(tiny_sd, targets=targets)
    assert said in str(caught.value)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_start_is_named_by_seed_and_module(tiny_sd: Path, init: str) -> None:
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    few = attached(tiny_sd, 5, init=init, targets="cross-kv")[1].weights().tensors
    assert torch.equal(torch.random.get_rng_state(), state), "torch's own generator was used"
    many = attached(tiny_sd, 5, init=init, targets="conv")[1].weights().tensors
    assert all(torch.equal(many[name], tensor) for name, tensor in few.items())
    other = attached(tiny_sd, 6, init=init, targets="cross-kv")[1].weights().tensors
    assert not any(torch.equal(other[name], few[name]) for name in few if "lora_A" in name)


def test_start_is_distributed_as_said(tiny_sd: Path) -> None:
    rank = 64
    gaussian = attached(tiny_sd, rank=rank, init="gaussian")[1].weights().tensors
    values = torch.cat([tensor.flatten() for name, tensor in gaussian.items() if "lora_A" in name])
    assert float(values.std()) == pytest.approx(1 / rank, rel=0.02)
    kaiming = attached(tiny_sd, rank=rank, targets=r".*resnets\.0\.conv1")[1].weights().tensors
    for name, tensor in kaiming.items():
        if "lora_A" in name:
            bound = 1 / math.sqrt(tensor[0].numel())
            assert 0.97 * bound < float(tensor.abs().max()) <= bound


def test_weights_come_back_bit_for_bit(tiny_sd: Path) -> None:
    family, adapter = attached(tiny_sd, alpha=2.0, text_encoder=True, use_rslora=True)
    randomise(adapter)
    saved = adapter.weights()
    assert saved.kind == "lora"
    assert saved.settings["rank"] == "4"
    again, other = attached(tiny_sd, seed=9, alpha=2.0, text_encoder=True, use_rslora=True)
    other.load(saved.tensors)
    assert torch.equal(answer(again), answer(family))
    assert all(torch.equal(value, saved.tensors[name]) for name, value in other.weights().tensors.items())


def test_weights_are_copies(tiny_sd: Path) -> None:
    _, adapter = attached(tiny_sd)
    before = adapter.weights().tensors
    kept = copy.deepcopy(before)
    randomise(adapter)
    assert all(torch.equal(kept[name], before[name]) for name in kept)


def test_foreign_weights_are_refused(tiny_sd: Path) -> None:
    _, adapter = attached(tiny_sd, alpha=2.0)
    good = adapter.weights().tensors
    first = next(iter(good))
    with pytest.raises(UserError, match="missing"):
        adapter.load({name: tensor for name, tensor in good.items() if name != first})
    with pytest.raises(UserError, match="unknown"):
        adapter.load({**good, "denoiser.other.lora_A.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="shape"):
        adapter.load({**good, first: torch.zeros(8, 16)})
    alpha = next(name for name in good if name.endswith(".alpha"))
    with pytest.raises(UserError, match="alpha is 4"):
        adapter.load({**good, alpha: torch.tensor(4.0)})


def test_it_learns(tiny_sd: Path) -> None:
    """One batch, fixed noise: a student finds what a teacher of the same shape does."""
    teacher, shown = attached(tiny_sd)
    randomise(shown, std=0.2)
    with torch.no_grad():
        target = answer(teacher)
    family, adapter = attached(tiny_sd, rank=8)
    optimizer = torch.optim.AdamW([p for group in adapter.groups() for p in group.parameters.values()], lr=1e-2)
    losses = []
    for _ in range(100):
        loss = (answer(family) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_dropout_acts_while_training_only(tiny_sd: Path) -> None:
    family, adapter = attached(tiny_sd, dropout=0.5)
    randomise(adapter)
    assert torch.equal(answer(family), answer(family))
    family.networks["denoiser"].train()
    assert not torch.equal(answer(family), answer(family))
    with adapter.disabled():
        assert torch.equal(answer(family), answer(family))


def test_lora_plus_is_two_groups_at_the_exact_ratio(tiny_sd: Path) -> None:
    """METHODS 1.5: disjoint, all of what trains, and B alone in the fast one; through the optimizer's own numbers."""
    _, adapter = attached(tiny_sd, lora_plus_ratio=16.0, text_encoder=True, text_encoder_learning_rate=3e-5)
    groups = adapter.groups()
    assert [group.name for group in groups] == ["denoiser", "denoiser_fast", "text_encoder", "text_encoder_fast"]
    names = [name for group in groups for name in group.parameters]
    assert len(names) == len(set(names)) and set(names) == set(adapter.parameters())
    assert all(".lora_B." in name for group in groups if "fast" in group.name for name in group.parameters)
    assert all(".lora_A." in name for group in groups if "fast" not in group.name for name in group.parameters)
    optimizer = build_optimizer(AdamWConfig(), groups, 1e-4)
    for rate in (0.1, 0.77, 1.0):
        found = set_rates(optimizer, rate)
        assert found["denoiser_fast"] == 16 * found["denoiser"]
        assert found["text_encoder_fast"] == 16 * found["text_encoder"] == pytest.approx(16 * 3e-5 * rate)


def test_ranks_by_pattern_keep_the_scale(tiny_sd: Path) -> None:
    ranks = {r".*attn1\.to_[qk]": 2, r".*attn1\..*": 3}
    family, adapter = attached(tiny_sd, rank=4, alpha=2.0, ranks=ranks, text_encoder=True)
    tensors = adapter.weights().tensors
    for name, layer in adapter.layers.items():
        rank = 2 if name.endswith(("attn1.to_q", "attn1.to_k")) else 3 if "attn1" in name else 4
        assert tensors[f"{name}.lora_A.weight"].shape[0] == tensors[f"{name}.lora_B.weight"].shape[1] == rank
        assert float(tensors[f"{name}.alpha"]) / rank == pytest.approx(0.5)
        assert layer.scaling["default"] == pytest.approx(0.5)
    assert {len(tensors[f"{name}.lora_A.weight"]) for name in adapter.layers} == {2, 3, 4}
    assert family.networks["text_encoder"] is not None


@pytest.mark.parametrize("pattern", [r".*attn3\..*", "to_q", r".*\.resnets\..*"])
def test_a_rank_for_no_layer_is_named(tiny_sd: Path, pattern: str) -> None:
    with pytest.raises(UserError, match=r"^adapter\.ranks: .*matches none of the adapted layers") as caught:
        attached(tiny_sd, ranks={pattern: 2})
    assert repr(pattern) in str(caught.value)


@pytest.mark.parametrize("targets", [r"mid_block\..*attn1\.to_q", r"mid_block\.resnets\.0\.conv1"])
def test_rank_dropout_masks_ranks_of_each_sample(tiny_sd: Path, targets: str) -> None:
    """METHODS 1.1: one mask over ranks per sample, the others scaled by ``1 / (1 - p)``; on average nothing changes."""
    family, adapter = attached(tiny_sd, rank_dropout=0.5, targets=targets)
    randomise(adapter)
    layer = next(iter(adapter.layers.values()))
    seen: list[Tensor] = []
    down = layer.lora_A["default"]
    down.register_forward_hook(lambda module, inputs, output: seen.append(output))
    sample = torch.ones(1, 16, 6, 6) if isinstance(down, nn.Conv2d) else torch.ones(1, 7, 16)
    x = sample.expand(64, *sample.shape[1:])
    plain = down(x).detach()
    family.networks["denoiser"].train()
    adapter.begin_step(1)
    assert torch.equal(down(x), plain), "it begins at the third step"
    adapter.begin_step(2)
    dropped = down(x).detach()
    axis = 1 if isinstance(down, nn.Conv2d) else 2
    ratio = (dropped / plain).movedim(axis, 1).flatten(2)  # [sample, rank, place]
    assert torch.equal(ratio, ratio[:, :, :1].expand_as(ratio)), "a rank is left out everywhere or nowhere"
    kept = ratio[:, :, 0]
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert 0.8 < float(kept.mean()) < 1.2
    assert len({tuple(row) for row in kept.tolist()}) > 4, "samples have masks of their own"
    family.networks["denoiser"].eval()
    assert torch.equal(down(x), plain)


@pytest.mark.parametrize("targets", ["attention", "conv"])
def test_max_norm_bounds_the_change(tiny_sd: Path, targets: str) -> None:
    """METHODS 1.1: ``n = max(||s B A||, max / 2)``, both factors times ``sqrt(min(n, max) / n)``."""
    _, adapter = attached(tiny_sd, alpha=6.0, targets=targets, max_norm=0.4)
    randomise(adapter)
    first = next(iter(adapter.layers.values()))
    with torch.no_grad():
        first.lora_B["default"].weight *= 1e-3
    before = {name: layer.get_delta_weight("default").detach() for name, layer in adapter.layers.items()}
    halves = {name: parameter.detach().clone() for name, parameter in adapter.parameters().items()}
    adapter.end_step({})
    short = long = 0
    for name, layer in adapter.layers.items():
        norm, after = float(before[name].norm()), layer.get_delta_weight("default")
        if norm <= 0.4:
            assert torch.equal(after, before[name])
            short += 1
            continue
        torch.testing.assert_close(after, before[name] * 0.4 / norm, rtol=1e-4, atol=1e-6)
        root = math.sqrt(0.4 / norm)
        a = adapter.parameters()[f"{name}.lora_A.weight"]
        torch.testing.assert_close(a.detach(), halves[f"{name}.lora_A.weight"] * root, rtol=1e-4, atol=1e-7)
        long += 1
    assert short and long


def test_without_max_norm_nothing_is_bounded(tiny_sd: Path) -> None:
    _, adapter = attached(tiny_sd)
    randomise(adapter)
    before = {name: parameter.detach().clone() for name, parameter in adapter.parameters().items()}
    adapter.end_step({})
    assert all(torch.equal(parameter, before[name]) for name, parameter in adapter.parameters().items())
