"""Hypernetworks: how the small networks are built, what they add, and what they leave alone (METHODS §4.6, §4.7)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from finetune.adapters import attach as attach_adapter
from finetune.adapters.hypernetwork import Hypernetworks
from finetune.batch import Conditioning
from finetune.config.adapters import Activation, HypernetworkConfig
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import load_family
from finetune.family import ModelFamily, Unsupported
from finetune.hypernet import ACTIVATIONS, REFUSED, Hypernetwork, Structure, attach, initialise, widths
from finetune.randomness import generator

GEOMETRY = torch.zeros(2, 6, dtype=torch.int64)
WIDTH, CONTEXT = 16, 24


def config(**changes: object) -> HypernetworkConfig:
    return HypernetworkConfig.model_validate({"kind": "hypernetwork", **changes})


def attached(folder: Path, seed: int = 0, **changes: object) -> tuple[ModelFamily, Hypernetworks]:
    family = load_family(ModelConfig(path=str(folder)))
    adapter = attach_adapter(config(**changes), family, seed)
    assert isinstance(adapter, Hypernetworks)
    return family, adapter


def question() -> tuple[Tensor, Tensor]:
    rng = generator(0, "question")
    return torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 5, 16, generator=rng)


def answer(family: ModelFamily) -> Tensor:
    noisy, tokens = question()
    return family.predict(noisy, torch.tensor([10, 700]), Conditioning(tokens=tokens), GEOMETRY)


@pytest.fixture(scope="module")
def make_unet() -> Callable[[], UNet2DConditionModel]:
    """A U-Net whose prompt is wider than its hidden states."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(WIDTH, WIDTH),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=CONTEXT,
        )
    state = made.state_dict()

    def make() -> UNet2DConditionModel:
        unet = UNet2DConditionModel.from_config(made.config)
        unet.load_state_dict(state)
        return unet.eval().requires_grad_(False)

    return make


def ask(unet: UNet2DConditionModel) -> Tensor:
    rng = generator(0, "ask")
    noisy, tokens = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 5, CONTEXT, generator=rng)
    return unet(noisy, torch.tensor([10, 700]), encoder_hidden_states=tokens).sample


def trained(sizes: list[int], seed: int = 0, structure: Structure | None = None) -> Hypernetwork:
    """As after training: far from the start."""
    network = initialise(Hypernetwork(structure or Structure(), sizes), "xavier_normal", seed)
    return network.eval()


@contextmanager
def read_by(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What each key and value layer was given by attention, and what its hooks made of it."""
    pairs: list[tuple[Tensor, Tensor]] = []
    given: list[Tensor] = []
    before = module.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]), prepend=True)
    after = module.register_forward_pre_hook(lambda _, inputs: pairs.append((given[-1], inputs[0])))
    yield pairs
    before.remove()
    after.remove()


NORM, DROP, SWISH, RELU, LINEAR = nn.LayerNorm, nn.Dropout, nn.Hardswish, nn.ReLU, nn.Linear


@pytest.mark.parametrize(
    ("structure", "modules"),
    [
        (Structure(), [LINEAR, LINEAR]),
        (Structure(activation="relu"), [LINEAR, RELU, LINEAR]),
        (
            Structure(activation="swish", layer_norm=True, dropout=(0, 0.3, 0)),
            [LINEAR, SWISH, NORM, DROP, LINEAR, NORM],
        ),
        (
            Structure((1, 2, 2, 1), "relu", activate_output=True),
            [LINEAR, RELU, LINEAR, RELU, LINEAR, RELU],
        ),
        (
            Structure((1, 1.5, 2, 1), "leakyrelu", dropout=(0, 0.05, 0, 0)),
            [LINEAR, nn.LeakyReLU, DROP, LINEAR, nn.LeakyReLU, LINEAR],
        ),
        (Structure(activation="linear", activate_output=True, layer_norm=True), [LINEAR, NORM, LINEAR, NORM]),
    ],
)
def test_modules_stand_in_the_order_of_the_table(structure: Structure, modules: list[type[nn.Module]]) -> None:
    """§4.7: the built network matches the table of layers."""
    built = structure.build(10)
    assert [type(module) for module in built] == modules
    sizes = [int(10 * share) for share in structure.layers]
    linears = [module for module in built if isinstance(module, nn.Linear)]
    assert [(module.in_features, module.out_features) for module in linears] == list(pairwise(sizes))
    assert all(module.bias is not None for module in linears)


def test_activations_are_torch_s_by_their_lower_case_names() -> None:
    """§4.2: every class of torch.nn.modules.activation has a place, or a reason to have none; recipes know the same."""
    classes = inspect.getmembers(torch.nn.modules.activation, inspect.isclass)
    own = {name.lower() for name, kind in classes if kind.__module__ == "torch.nn.modules.activation"}
    assert own == (ACTIVATIONS.keys() | REFUSED) - {"linear", "swish"}
    assert set(get_args(Activation)) == ACTIVATIONS.keys()
    assert ACTIVATIONS["swish"] is nn.Hardswish
    for name in ACTIVATIONS:
        structure = Structure(activation=name, activate_output=True)
        network = initialise(Hypernetwork(structure, [8]), "xavier_normal", 0).eval()
        states = torch.randn(2, 3, 8, generator=generator(0, name))
        assert network.change("k", states).shape == states.shape
        torch.testing.assert_close(
            network.change("k", states)[:1], network.change("k", states[:1]), msg="mixes pictures"
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": (2, 1)}, "begin and end with 1"),
        ({"layers": (1,)}, "begin and end with 1"),
        ({"activation": "sigmoidd"}, "did you mean 'sigmoid'"),
        ({"activation": "softmax"}, "no activation 'softmax'"),
        ({"dropout": (0, 0.3)}, "3 shares"),
        ({"dropout": (0, 0.3, 0.3)}, "first and the last 0"),
        ({"dropout": (0, 1.0, 0)}, "below 1"),
    ],
)
def test_a_structure_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Structure(**changes)
    with pytest.raises(UserError, match="leaves nothing"):
        Structure(layers=(1, 0.01, 1)).build(16)


@pytest.mark.parametrize("width", [96, 320, 768])
def test_deviation_at_the_start(width: int) -> None:
    """§4.7: within 10 % of 1.41e-4 * d for a linear network drawn normally."""
    network = initialise(Hypernetwork(Structure(), [width]), "normal", 0).eval()
    states = torch.randn(64, width, generator=generator(0, "states"))
    with torch.no_grad():
        moved = (network.change("k", states) - states).norm(dim=1) / states.norm(dim=1)
    assert float(moved.mean()) == pytest.approx(1.41e-4 * width, rel=0.1)


@pytest.mark.parametrize(
    ("rule", "activation", "std"),
    [
        ("normal", "relu", 0.01),
        ("xavier_uniform", "relu", (2 / (256 + 512)) ** 0.5),
        ("xavier_normal", "relu", (2 / (256 + 512)) ** 0.5),
        ("kaiming_uniform", "relu", (2 / 256) ** 0.5),
        ("kaiming_normal", "leakyrelu", (2 / 256) ** 0.5),
    ],
)
def test_start_is_distributed_as_said(rule: str, activation: str, std: float) -> None:
    """§4.2: the rule is for linear weights; layer norms are N(0, 0.01) whatever it is, and biases 0."""
    structure = Structure(activation=activation, layer_norm=True)
    network = initialise(Hypernetwork(structure, [256]), rule, 0)
    linear, norm = network["256"]["k"].linear[0], network["256"]["k"].linear[2]  # type: ignore[index]
    assert float(linear.weight.detach().std()) == pytest.approx(std, rel=0.02)
    assert float(norm.weight.detach().std()) == pytest.approx(0.01, rel=0.15)
    assert abs(float(norm.weight.detach().mean())) < 0.002
    assert not any(bool(value.any()) for name, value in network.named_parameters() if name.endswith("bias"))
    uniform = float(linear.weight.detach().abs().max()) < 1.75 * std
    assert uniform == rule.endswith("uniform")


def test_start_is_named_by_seed_and_module(tiny_sd: Path) -> None:
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first = attached(tiny_sd, 5)[1].weights().tensors
    assert torch.equal(torch.random.get_rng_state(), state), "torch's own generator was used"
    again, other = attached(tiny_sd, 5)[1].weights().tensors, attached(tiny_sd, 6)[1].weights().tensors
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    assert not any(torch.equal(other[name], first[name]) for name in first if name.endswith("weight"))
    one, more = (initialise(Hypernetwork(Structure(), sizes), "normal", 5).state_dict() for sizes in ([16], [8, 16]))
    assert all(torch.equal(more[name], tensor) for name, tensor in one.items())
    assert not torch.equal(one["16.k.linear.0.weight"], one["16.v.linear.0.weight"])


@pytest.mark.parametrize("structure", [{}, {"layer_norm": True, "activation": "relu", "activate_output": True}])
def test_zero_last_begins_at_the_untouched_model_and_learns(tiny_sd: Path, structure: dict[str, Any]) -> None:
    """§4.2: the extra option, compatible with files of A1111."""
    family = load_family(ModelConfig(path=str(tiny_sd)))
    family.require("denoiser")
    before = answer(family)
    adapter = attach_adapter(config(zero_last=True, **structure), family, 0)
    assert torch.equal(answer(family), before)
    parameters = list(adapter.groups()[0].parameters.values())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        answer(family).square().mean().backward()
        optimizer.step()
    assert all(bool(parameter.grad.any()) for parameter in parameters)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_layers_read_c_plus_m_f_of_c(
    make_unet: Callable[[], UNet2DConditionModel], strength: float, processor: type
) -> None:
    """§4.7: the input of to_k and to_v is c + m F(c) in eval, for every attention processor; m = 0 is the base."""
    unet = make_unet()
    unet.set_attn_processor(processor())
    before = ask(unet)
    network = trained([WIDTH, CONTEXT], structure=Structure(activation="swish"))
    network.multiplier = strength
    attach(unet, network)
    for block, width in (("attn1", WIDTH), ("attn2", CONTEXT)):
        attention = getattr(unet.mid_block.attentions[0].transformer_blocks[0], block)
        for role in ("k", "v"):
            mlp = network[str(width)][role]  # type: ignore[index]
            with read_by(getattr(attention, f"to_{role}")) as pairs, torch.no_grad():
                answered = ask(unet)
                ((given, read),) = pairs
                torch.testing.assert_close(read, given + strength * mlp.linear(given), rtol=1e-6, atol=1e-6)
                assert torch.equal(read, given) == (strength == 0)
    assert torch.equal(answered, before) == (strength == 0)


def test_queries_are_untouched(make_unet: Callable[[], UNet2DConditionModel]) -> None:
    """§4.1: q = to_q(x)."""
    unet = make_unet()
    attach(unet, trained([WIDTH, CONTEXT]))
    assert not any(
        part._forward_pre_hooks for name, part in unet.named_modules() if name.endswith(("to_q", "to_out.0"))
    )


@pytest.mark.parametrize("multiplier", [0.0, 0.3])
def test_strength_has_no_part_in_training(tiny_sd: Path, multiplier: float) -> None:
    """§4.6, §4.7: in train mode m is ignored, so that nothing that a user has set leaks into training."""
    family, adapter = attached(tiny_sd, init="xavier_normal")
    whole = answer(family)
    adapter.network.multiplier = multiplier
    family.networks["hypernetwork"].eval()
    assert not torch.equal(answer(family), whole)
    family.networks["hypernetwork"].train()
    assert torch.equal(answer(family), whole)


def hooked(unet: nn.Module) -> dict[str, int]:
    return {
        name: len(part._forward_pre_hooks) for name, part in unet.named_modules() if part._forward_pre_hooks and name
    }


def test_the_prompt_s_width_alone_leaves_self_attention_untouched(
    make_unet: Callable[[], UNet2DConditionModel],
) -> None:
    """§4.7: sizes [ctx] hook as many layers as there are attn2, and no attn1."""
    unet = make_unet()
    assert widths(unet) == [WIDTH, CONTEXT]
    attach(unet, trained([CONTEXT]))
    crossing = sum(name.endswith("attn2") for name, _ in unet.named_modules())
    assert crossing == 4
    assert len(hooked(unet)) == 2 * crossing
    assert all(".attn2.to_" in name for name in hooked(unet))
    whole = make_unet()
    attach(whole, trained([WIDTH, CONTEXT]))
    assert len(hooked(whole)) == 4 * crossing
    assert set(hooked(whole).values()) == {1}


def test_layers_of_one_width_share_one_pair(make_unet: Callable[[], UNet2DConditionModel], tiny_sd: Path) -> None:
    """§4.7: one module object per width."""
    _, adapter = attached(tiny_sd)
    mlps = [name for name, part in adapter.network.named_modules() if type(part).__name__ == "Mlp"]
    assert mlps == ["16.k", "16.v"]
    unet = make_unet()
    network = trained([WIDTH])
    attach(unet, network)
    calls: list[str] = []
    network["16"]["k"].register_forward_hook(lambda *_: calls.append("k"))  # type: ignore[index]
    ask(unet)
    assert len(calls) == sum(name.endswith("attn1") for name, _ in unet.named_modules())


def test_two_in_a_chain_are_one_after_the_other(make_unet: Callable[[], UNet2DConditionModel]) -> None:
    """§4.7: two chained hypernetworks equal manual composition, whatever their strengths."""
    unet = make_unet()
    first, second = trained([WIDTH, CONTEXT], 1), trained([CONTEXT], 2)
    first.multiplier, second.multiplier = 0.5, 0.8
    attach(unet, first)
    attach(unet, second)
    with torch.no_grad(), read_by(unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v) as pairs:
        ask(unet)
        ((given, read),) = pairs
        middle = given + 0.5 * first["24"]["v"].linear(given)  # type: ignore[index]
        torch.testing.assert_close(read, middle + 0.8 * second["24"]["v"].linear(middle))  # type: ignore[index]


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_wrappers_of_peft_are_followed(make_unet: Callable[[], UNet2DConditionModel], when: str) -> None:
    """§4.5: hook the wrapper: B A reads what W reads, whenever the LoRA comes, and the order of the chain stays."""

    def lora(unet: UNet2DConditionModel) -> None:
        settings = peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            unet.add_adapter(settings)

    networks = trained([WIDTH, CONTEXT], 1), trained([WIDTH, CONTEXT], 2)
    expected = make_unet()
    lora(expected)
    for network in networks:
        attach(expected, network)
    unet = make_unet()
    steps: dict[str, list[Callable[[], None]]] = {
        "before": [lambda: lora(unet), lambda: attach(unet, networks[0]), lambda: attach(unet, networks[1])],
        "between": [lambda: attach(unet, networks[0]), lambda: lora(unet), lambda: attach(unet, networks[1])],
        "after": [lambda: attach(unet, networks[0]), lambda: attach(unet, networks[1]), lambda: lora(unet)],
    }
    for step in steps[when]:
        step()
    assert torch.equal(ask(unet), ask(expected))
    wrapper = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    assert len(wrapper._forward_pre_hooks) == 1
    assert not wrapper.base_layer._forward_pre_hooks
    plain = make_unet()
    for network in networks:
        attach(plain, network)
    unet.delete_adapters("default")
    assert torch.equal(ask(unet), ask(plain))


def test_fused_projections_are_refused_whenever_they_come(make_unet: Callable[[], UNet2DConditionModel]) -> None:
    """§4.5: not with fused QKV."""
    unet = make_unet()
    unet.fuse_qkv_projections()
    with pytest.raises(UserError, match="fused"):
        attach(unet, trained([CONTEXT]))
    later = make_unet()
    attach(later, trained([CONTEXT]))
    changed = ask(later)
    later.fuse_qkv_projections()
    with pytest.raises(UserError, match="unfuse_qkv_projections"):
        ask(later)
    later.unfuse_qkv_projections()
    assert torch.equal(ask(later), changed)


def test_widths_that_the_model_lacks_are_an_error(tiny_sd: Path) -> None:
    """§4.6: they would train to nothing."""
    with pytest.raises(UserError, match=r"adapter: a hypernetwork of width 768 would never be used: .* read 16$"):
        attached(tiny_sd, sizes=[16, 768])


def test_a_model_without_such_layers_is_an_error() -> None:
    with pytest.raises(UserError, match="no key and value layers"):
        attach(nn.Sequential(nn.Linear(4, 4)), trained([4]))


def test_a_family_that_has_no_such_site_says_why() -> None:
    """§4.5: MMDiT has no meaning of A1111's."""
    sites = SimpleNamespace(readers=Unsupported("its layers read prompt and picture together"))
    family: Any = SimpleNamespace(name="sd3", sites=sites)
    with pytest.raises(UserError, match="no place in sd3: its layers read prompt and picture together"):
        Hypernetworks(config(), family, 0)


def test_only_the_hypernetwork_learns(tiny_sd: Path) -> None:
    """§4.7: gradients on its parameters alone; the model stays as it is."""
    family, adapter = attached(tiny_sd, activation="swish", layer_norm=True)
    (group,) = adapter.groups()
    assert group.parameters.keys() == {
        f"hypernetwork.16.{role}.linear.{place}.{what}"
        for role in ("k", "v")
        for place in (0, 2, 3, 4)
        for what in ("weight", "bias")
    }
    base = {name: p.clone() for name, p in family.networks["denoiser"].named_parameters()}
    optimizer = torch.optim.AdamW(group.parameters.values(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        answer(family).square().mean().backward()
        with_gradient = {id(p) for p in family.networks.parameters() if p.grad is not None}
        assert with_gradient == {id(p) for p in group.parameters.values()}
        optimizer.step()
        optimizer.zero_grad()
    after = dict(family.networks["denoiser"].named_parameters())
    assert all(torch.equal(after[name], value) for name, value in base.items())
    assert adapter.networks() == {"hypernetwork"}
    assert not any("hypernetwork" in name for name in family.networks["denoiser"].state_dict())


def test_disabled_is_the_untouched_model(tiny_sd: Path) -> None:
    family = load_family(ModelConfig(path=str(tiny_sd)))
    family.require("denoiser")
    before = answer(family)
    adapter = attach_adapter(config(init="xavier_normal"), family, 0)
    assert not torch.equal(changed := answer(family), before)
    with adapter.disabled():
        assert torch.equal(answer(family), before)
        family.networks["hypernetwork"].train()
        assert torch.equal(answer(family), before)
    assert torch.equal(answer(family), changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_computes_in_float32_on_a_half_base(dtype: torch.dtype, tiny_sd: Path) -> None:
    """§4.6: modules stay in float32, and the denoiser gets its own dtype back."""
    family = load_family(ModelConfig(path=str(tiny_sd)))
    family.require("denoiser")
    family.networks["denoiser"].to(dtype)
    adapter = attach_adapter(config(init="xavier_normal"), family, 0)
    assert {p.dtype for p in adapter.groups()[0].parameters.values()} == {torch.float32}
    layer = family.networks["denoiser"].get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_k")
    with torch.no_grad(), read_by(layer) as pairs:
        layer(torch.randn(2, 3, 16, generator=generator(0, "half")).to(dtype))
        ((given, read),) = pairs
        mlp = family.networks["hypernetwork"]["16"]["k"]  # type: ignore[index]
        assert torch.equal(read, (given.float() + mlp.linear(given.float())).to(dtype))


def test_dropout_acts_while_training_only(tiny_sd: Path) -> None:
    family, _ = attached(tiny_sd, init="xavier_normal", dropout=[0, 0.5, 0])
    family.networks.eval()
    assert torch.equal(answer(family), answer(family))
    family.networks["hypernetwork"].train()
    assert not torch.equal(answer(family), answer(family))


def test_gradient_checkpointing_changes_no_gradient(tiny_sd: Path) -> None:
    """What is trained stands outside of the blocks that are computed again."""
    gradients = []
    for saving in (False, True):
        family, adapter = attached(tiny_sd, init="xavier_normal")
        if saving:
            family.enable_gradient_checkpointing()
        answer(family).square().mean().backward()
        gradients.append({name: p.grad for name, p in adapter.groups()[0].parameters.items()})
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())


def test_weights_come_back_bit_for_bit(tiny_sd: Path) -> None:
    family, adapter = attached(tiny_sd, init="xavier_normal", activation="mish", layers=[1, 0.5, 1])
    saved = adapter.weights()
    again, other = attached(tiny_sd, seed=9, activation="mish", layers=[1, 0.5, 1])
    other.load(saved.tensors)
    assert torch.equal(answer(again), answer(family))
    assert (saved.kind, saved.settings["layers"], saved.settings["activation"]) == (
        "hypernetwork",
        "[1.0, 0.5, 1.0]",
        "mish",
    )
    name = "hypernetwork.16.k.linear.0.weight"
    with torch.no_grad():
        adapter.groups()[0].parameters[name].zero_()
    assert bool(saved.tensors[name].any()), "weights are no copies"


def test_foreign_weights_are_refused(tiny_sd: Path) -> None:
    _, adapter = attached(tiny_sd)
    good = adapter.weights().tensors
    name = "hypernetwork.16.k.linear.0.weight"
    with pytest.raises(UserError, match="missing"):
        adapter.load({key: tensor for key, tensor in good.items() if key != name})
    with pytest.raises(UserError, match="unknown"):
        adapter.load({**good, "hypernetwork.32.k.linear.0.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="shape"):
        adapter.load({**good, name: torch.zeros(8, 16)})


def test_other_networks_come_and_go_around_it(tiny_sd: Path) -> None:
    """Sampling loads and frees the parts of the model that it needs; the extra network is none of them."""
    family, adapter = attached(tiny_sd, init="xavier_normal")
    before = answer(family)
    family.pipeline()
    family.release("vae", "text_encoder")
    assert set(family.networks) == {"denoiser", "hypernetwork"}
    assert torch.equal(answer(family), before)
    family.release(*list(family.networks))
    family.require("denoiser")
    assert not torch.equal(answer(family), before)
    assert adapter.groups()[0].parameters
