"""What all adapters of single layers promise (METHODS 1.5), one section after the other for every variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from injected_layers import GEOMETRY, answer, attached, base_answer, move, noisy, train

from finetune.config.schema import ModelConfig
from finetune.families import load_family

EXACT: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "targets": "conv"},
    "rslora": {"kind": "lora", "rank": 4, "targets": "conv", "use_rslora": True},
    "dora": {"kind": "lora", "rank": 4, "targets": "conv", "use_dora": True},
    "ranks": {"kind": "lora", "rank": 4, "targets": "conv", "ranks": {r".*\.conv[12]": 2, r"mid_block\..*": 3}},
    "lokr": {"kind": "lokr", "rank": 4, "targets": "conv"},
    "lokr, decomposed": {"kind": "lokr", "rank": 1, "alpha": 3.0, "targets": "conv"},
    "loha": {"kind": "loha", "rank": 2, "targets": "conv"},
    "oft": {"kind": "oft", "block_size": 4, "targets": "wide"},
    "oft, series": {"kind": "oft", "block_size": 4, "targets": "wide", "exact": False},
}
ALL = EXACT | {"pissa": {"kind": "lora", "rank": 4, "targets": "conv", "init": "pissa"}}
every = pytest.mark.parametrize("settings", ALL.values(), ids=ALL)


@pytest.mark.parametrize("settings", EXACT.values(), ids=EXACT)
def test_nothing_changes_before_training(tiny_sd: Path, settings: dict[str, Any]) -> None:
    """METHODS 1.5, identity: bit-equal."""
    family, _ = attached(tiny_sd, **settings, text_encoder=True)
    base = load_family(ModelConfig(path=str(tiny_sd)))
    base.require("denoiser", "text_encoder")
    assert torch.equal(answer(family), answer(base))
    assert torch.equal(family.encode_prompt(["a red star"]).tokens, base.encode_prompt(["a red star"]).tokens)


@every
def test_disabled_is_the_untouched_model(tiny_sd: Path, settings: dict[str, Any]) -> None:
    family, adapter = attached(tiny_sd, **settings)
    move(adapter)
    trained = answer(family)
    with adapter.disabled():
        assert torch.equal(answer(family), base_answer(tiny_sd))
    assert torch.equal(answer(family), trained)
    assert not torch.allclose(trained, base_answer(tiny_sd), atol=1e-3)
    assert all(p.requires_grad for p in adapter.parameters().values())


@every
def test_only_what_was_added_learns(tiny_sd: Path, settings: dict[str, Any]) -> None:
    """METHODS 1.5, gradient; 1.4.2 and 1.4.5: all of it learns, and the base stays bit-equal."""
    family, adapter = attached(tiny_sd, **settings, text_encoder=True)
    family.require("vae")
    parameters = adapter.parameters()
    own = {id(parameter) for parameter in parameters.values()}
    base = {name: p.clone() for name, p in family.networks.named_parameters() if id(p) not in own}
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    assert {id(p) for p in family.networks.parameters() if p.requires_grad} == own
    train(family, adapter, 5)
    after = {name: p for name, p in family.networks.named_parameters() if id(p) not in own}
    assert all(torch.equal(after[name], value) for name, value in base.items())
    assert not [name for name, parameter in parameters.items() if torch.equal(parameter, start[name])]


@every
def test_no_gradient_is_missing_in_the_first_two_updates(tiny_sd: Path, settings: dict[str, Any]) -> None:
    """A run ends where a weight has no gradient; dropouts, however large, must not look like that."""
    dropouts = {} if settings.get("init") == "pissa" else {"module_dropout": 0.99}
    family, adapter = attached(tiny_sd, **settings, **dropouts, text_encoder=True)
    family.networks.train()
    silent = set(adapter.parameters())
    for step in range(2):
        adapter.begin_step(step)
        prompt = family.encode_prompt(["a red star", "a photo"])
        family.predict(noisy(), torch.tensor([10, 700]), prompt, GEOMETRY).square().mean().backward()
        assert all(parameter.grad is not None for parameter in adapter.parameters().values())
        silent -= {name for name, p in adapter.parameters().items() if bool(p.grad.any())}
        with torch.no_grad():
            for parameter in adapter.parameters().values():
                parameter -= 0.1 * parameter.grad / (parameter.grad.norm() + 1e-12)
                parameter.grad = None
    assert not silent


@every
def test_it_learns(tiny_sd: Path, settings: dict[str, Any]) -> None:
    """Twenty steps on one batch make the error smaller, and it stays finite."""
    family, adapter = attached(tiny_sd, **settings)
    losses = train(family, adapter, 20)
    assert losses[-1] < 0.97 * losses[0]


@every
def test_weights_come_back_bit_for_bit(tiny_sd: Path, settings: dict[str, Any]) -> None:
    family, adapter = attached(tiny_sd, **settings, text_encoder=True)
    move(adapter)
    saved = adapter.weights()
    again, other = attached(tiny_sd, seed=9, **settings, text_encoder=True)
    other.load(saved.tensors)
    assert torch.equal(answer(again), answer(family))
    assert all(torch.equal(value, saved.tensors[name]) for name, value in other.weights().tensors.items())
    assert all(isinstance(value, str) for value in saved.settings.values())


@every
def test_start_is_named_by_seed_and_layer(tiny_sd: Path, settings: dict[str, Any]) -> None:
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    few = attached(tiny_sd, 5, **{**settings, "targets": r"mid_block\..*to_q", "ranks": {}} if "ranks" in settings
                   else {**settings, "targets": r"mid_block\..*to_q"})[1].parameters()  # fmt: skip
    many = attached(tiny_sd, 5, **{**settings, "ranks": {}} if "ranks" in settings else settings)[1].parameters()
    assert torch.equal(torch.random.get_rng_state(), state), "torch's own generator was used"
    assert few and all(torch.equal(many[name], value) for name, value in few.items())


@every
def test_what_trains_is_float32_on_a_half_base(tiny_sd: Path, settings: dict[str, Any]) -> None:
    """METHODS 1.4.1."""
    family = load_family(ModelConfig(path=str(tiny_sd)))
    family.require("denoiser")
    family.networks["denoiser"].to(torch.bfloat16)
    from pydantic import TypeAdapter

    from finetune.adapters import attach
    from finetune.config.adapters import AdapterConfig

    adapter: Any = attach(TypeAdapter(AdapterConfig).validate_python(settings), family, 0)
    assert {p.dtype for p in adapter.parameters().values()} == {torch.float32}


@every
def test_text_encoder_has_its_own_rate(tiny_sd: Path, settings: dict[str, Any]) -> None:
    _, adapter = attached(tiny_sd, **settings, text_encoder=True, text_encoder_learning_rate=1e-6)
    rates = {group.name.split("_fast")[0].split("_magnitude")[0]: group.learning_rate for group in adapter.groups()}
    assert rates == {"denoiser": None, "text_encoder": 1e-6}
    assert adapter.networks() == {"denoiser", "text_encoder"}
    listed = [id(p) for group in adapter.groups() for p in group.parameters.values()]
    assert sorted(listed) == sorted(id(p) for p in adapter.parameters().values())


@pytest.mark.parametrize("name", [name for name in ALL if name != "pissa"])
def test_module_dropout_leaves_out_whole_layers(tiny_sd: Path, name: str) -> None:
    """METHODS 1.1: with that probability the whole change is skipped; gradients are zeros then, which other
    processes wait for."""
    family, adapter = attached(tiny_sd, **ALL[name], module_dropout=0.5)
    move(adapter)
    whole = answer(family)
    layer = next(iter(adapter.layers.values()))
    channels = layer.in_channels if hasattr(layer, "in_channels") else layer.in_features
    shape = (1, channels, 4, 4) if layer.get_base_layer().weight.ndim == 4 else (1, channels)
    x = torch.ones(shape)
    family.networks.train()
    assert torch.equal(answer(family), whole), "dropout begins at the third step"
    adapter.begin_step(2)
    with torch.no_grad():
        changed, base = layer.eval()(x), layer.get_base_layer()(x)
        layer.train()
        seen = [layer(x) for _ in range(200)]
    share = sum(torch.equal(one, base) for one in seen) / len(seen)
    assert 0.35 < share < 0.65
    assert all(torch.equal(one, base) or torch.allclose(one, changed, atol=1e-6) for one in seen)
    torch.manual_seed(0)
    answer(family).square().mean().backward()
    gradients = [parameter.grad for parameter in adapter.parameters().values()]
    assert all(gradient is not None for gradient in gradients)
    assert any(not bool(gradient.any()) for gradient in gradients if gradient is not None)
    with adapter.disabled():
        assert torch.equal(answer(family), base_answer(tiny_sd))
    family.networks.eval()
    assert torch.equal(answer(family), whole)


@pytest.mark.parametrize("name", [*EXACT])
def test_checkpointing_drops_the_same_layers_twice(tiny_sd: Path, name: str) -> None:
    """METHODS 1.4.3: what is computed again for the backward pass sees the same dropouts, and the text encoder's
    factors get their gradients although its inputs ask for none."""
    gradients = []
    for checkpointing in (False, True):
        dropouts = {"module_dropout": 0.4} | (
            {"rank_dropout": 0.4, "dropout": 0.2} if name in ("lora", "ranks") else {}
        )
        family, adapter = attached(tiny_sd, **EXACT[name], **dropouts, text_encoder=True)
        move(adapter)
        if checkpointing:
            family.enable_gradient_checkpointing()
        family.networks.train()
        adapter.begin_step(2)
        torch.manual_seed(11)
        prompt = family.encode_prompt(["a red star", "a photo"])
        family.predict(noisy(), torch.tensor([10, 700]), prompt, GEOMETRY).square().mean().backward()
        gradients.append({key: parameter.grad for key, parameter in adapter.parameters().items()})
    plain, again = gradients
    assert any(bool(gradient.any()) for key, gradient in plain.items() if key.startswith("text_encoder."))
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, rtol=1e-4, atol=1e-6, msg=key)
