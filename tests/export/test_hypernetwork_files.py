"""Hypernetworks as files: A1111's ``.pt``, ours, what old files lack, and what other tools make of them."""

from __future__ import annotations

import json
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import finetune
from finetune.adapters import attach
from finetune.config.adapters import HypernetworkConfig
from finetune.config.schema import ModelConfig, SamplerConfig
from finetune.errors import GuardError, UserError
from finetune.export import export, identify, verify
from finetune.export import read as read_weights
from finetune.export.hypernetwork import comfyui_objection, convert, read, structure_of, unpickled
from finetune.export.pickles import write_pickle
from finetune.export.sample import sample
from finetune.families import load_family
from finetune.hypernet import Hypernetwork, Structure, initialise
from finetune.randomness import generator

STRUCTURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep with norms and dropout": {
        "layers": [1, 2, 1.5, 1],
        "activation": "swish",
        "layer_norm": True,
        "dropout": [0, 0.05, 0.1, 0],
    },
    "activated": {"activation": "relu", "activate_output": True, "dropout": [0, 0.3, 0]},
}


@pytest.fixture
def exported(recipe, tiny_sd, tmp_path):
    """Weights that have moved and their files, by layout, for any section."""

    def make(settings: dict[str, Any] | None = None, **sections: Any):
        section = {"kind": "hypernetwork", **(settings or {})}
        one = recipe(recipe="hypernetwork", adapter=section, **sections)
        family = load_family(ModelConfig(path=str(tiny_sd)))
        adapter = attach(HypernetworkConfig.model_validate(section), family, one.seed)
        with torch.no_grad():
            for name, parameter in adapter.groups()[0].parameters.items():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator(1, name))
        paths = export(adapter.weights(), family, one, tmp_path / "out")
        return adapter.weights(), {path.suffix.removeprefix("."): path for path in paths}

    return make


def answers(network: Hypernetwork, width: int = 16) -> dict[str, Tensor]:
    states = torch.randn(2, 3, width, generator=generator(0, "states"))
    return {role: network.change(role, states) for role in ("k", "v")}


def same(first: Hypernetwork, second: Hypernetwork) -> bool:
    one, other = answers(first), answers(second)
    return all(torch.equal(one[role], other[role]) for role in one)


def failures(path: Path, **options: Any) -> dict[str, str]:
    return {check.name: check.detail for check in verify(path, **options).checks if not check.passed}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_both_files_hold_what_was_trained(exported, structure: str) -> None:
    """METHODS §4.7: a .pt written by us loads back bit-equal; so does ours, and a fresh pipeline draws with either."""
    weights, paths = exported(STRUCTURES[structure])
    assert {path.name for path in paths.values()} == {"zib.safetensors", "zib.pt"}
    for path in paths.values():
        for given in (weights, None):
            result = verify(path, weights=given).require()
            details = {check.name: check.detail for check in result.checks}
            assert details["diffusers: output"] == "equal bit for bit"
            assert {"finite", "keys", "learned", "diffusers: strength 0"} <= details.keys()
    back = read_weights(paths["safetensors"], {})
    assert (back.kind, back.settings["init"]) == (weights.kind, weights.settings["init"])
    assert Structure.of(back.settings) == Structure.of(weights.settings)
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in weights.tensors.items())
    assert same(read(paths["pt"]).network(), read(paths["safetensors"]).network())
    assert [identify(paths[kind]).layout for kind in ("safetensors", "pt")] == ["diffusers", "a1111"]


def test_pickle_is_a1111_s(exported) -> None:
    """FORMATS §3.1, §3.3, §3.4: settings as plain Python, integer keys, no dropout and its places not counted."""
    _, paths = exported(STRUCTURES["deep with norms and dropout"])
    content = torch.load(paths["pt"], weights_only=True)
    key, value = content.pop(16)
    places = [f"linear.{place}.{what}" for place in (0, 2, 3, 5, 6, 7) for what in ("weight", "bias")]
    assert list(key) == list(value) == places
    assert type(key) is OrderedDict
    assert {name: (type(entry), entry) for name, entry in content.items()} == {
        "step": (int, 1000),
        "name": (str, "zib"),
        "layer_structure": (list, [1, 2, 1.5, 1]),
        "activation_func": (str, "swish"),
        "is_layer_norm": (bool, True),
        "weight_initialization": (str, "Normal"),
        "sd_checkpoint": (type(None), None),
        "sd_checkpoint_name": (str, content["sd_checkpoint_name"]),
        "activate_output": (bool, False),
        "use_dropout": (bool, False),
        "dropout_structure": (list, [0.0, 0.0, 0.0, 0.0]),
        "last_layer_dropout": (bool, False),
        "optional_info": (str, f"finetune {finetune.__version__}"),
    }
    assert [type(share) for share in content["layer_structure"]] == [int, int, float, int]
    with zipfile.ZipFile(paths["pt"]) as archive:
        names = {name.split("/", 1)[1].split("/")[0] for name in archive.namelist()}
    assert names == {"data.pkl", "version", "data"}


def test_activation_is_never_none(exported) -> None:
    """FORMATS §3.3: ComfyUI does not know None; the identity is called linear."""
    _, paths = exported()
    assert torch.load(paths["pt"], weights_only=True)["activation_func"] == "linear"


def test_our_file_keeps_dropout_and_says_what_it_is(exported, tiny_sd: Path) -> None:
    """FORMATS §3.5."""
    weights, paths = exported(STRUCTURES["activated"])
    with safe_open(paths["safetensors"], "pt") as file:
        header = file.metadata()
    tensors = load_file(paths["safetensors"])
    assert {f"hypernetwork.{name}" for name in tensors} == weights.tensors.keys()
    assert header["hypernetwork.format"] == "a1111"
    assert json.loads(header["hypernetwork.config"])["dropout_structure"] == [0, 0.3, 0]
    assert header["modelspec.architecture"] == "stable-diffusion-custom/hypernetwork"
    assert (header["finetune.kind"], header["finetune.base"]) == ("hypernetwork", str(tiny_sd))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_files_are_what_was_trained_rounded(exported, dtype: str) -> None:
    weights, paths = exported(export={"dtype": dtype})
    for path in paths.values():
        assert {tensor.dtype for tensor in read(path).tensors.values()} == {getattr(torch, dtype)}
        verify(path, weights=weights).require()


@pytest.mark.parametrize("layers", [[1, 2, 1], [1, *range(2, 12), 1]])
def test_conversion_there_and_back_loses_nothing(exported, tmp_path: Path, layers: list[int]) -> None:
    """FORMATS §3.5: order by number (linear.10 after linear.2), dtypes, settings: the same bytes again."""
    _, paths = exported({"layers": layers, "activation": "tanh"}, export={"dtype": "float16"})
    convert(paths["pt"], tmp_path / "there.safetensors")
    convert(tmp_path / "there.safetensors", tmp_path / "back.pt")
    assert (tmp_path / "back.pt").read_bytes() == paths["pt"].read_bytes()
    keys = list(torch.load(paths["pt"], weights_only=True)[16][0])
    assert keys == sorted(keys, key=lambda name: (int(name.split(".")[1]), name.endswith("bias")))
    with pytest.raises(UserError, match=r"not \.ckpt"):
        convert(paths["pt"], tmp_path / "there.ckpt")


def test_foreign_settings_survive_a_conversion(tmp_path: Path) -> None:
    content = old_file() | {"step": 7000, "sd_checkpoint": "81761151", "optional_info": "by hand"}
    write_pickle(tmp_path / "old.pt", content)
    convert(tmp_path / "old.pt", tmp_path / "new.safetensors")
    facts = read(tmp_path / "new.safetensors").facts
    assert (facts["step"], facts["sd_checkpoint"], facts["optional_info"]) == (7000, "81761151", "by hand")


def old_file(width: int = 16) -> dict[Any, Any]:
    """A file from before layers had a structure."""

    def network(role: str) -> OrderedDict[str, Tensor]:
        rng = generator(0, "old", role)
        return OrderedDict(
            [
                ("linear1.weight", torch.randn(2 * width, width, generator=rng) * 0.1),
                ("linear1.bias", torch.randn(2 * width, generator=rng) * 0.1),
                ("linear2.weight", torch.randn(width, 2 * width, generator=rng) * 0.1),
                ("linear2.bias", torch.randn(width, generator=rng) * 0.1),
            ]
        )

    return {width: (network("k"), network("v")), "step": 12, "name": "old", "sd_checkpoint": None}


def test_old_names_and_missing_keys_mean_what_they_meant(tmp_path: Path) -> None:
    """METHODS §4.7: a hand-made old-style file (linear1) loads, with activate_output True and a linear [1, 2, 1]."""
    content = old_file()
    write_pickle(tmp_path / "old.pt", content)
    stored = read(tmp_path / "old.pt")
    assert stored.structure == Structure((1, 2, 1), "linear", activate_output=True)
    states = torch.randn(2, 3, 16, generator=generator(0, "states"))
    network = stored.network()
    for index, role in enumerate(("k", "v")):
        part = content[16][index]
        inner = nn.functional.linear(states, part["linear1.weight"], part["linear1.bias"])
        expected = states + nn.functional.linear(inner, part["linear2.weight"], part["linear2.bias"])
        torch.testing.assert_close(network.change(role, states), expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Structure(activate_output=True)),
        ({"activation_func": None, "activate_output": False}, Structure()),
        ({"activation_func": "relu"}, Structure(activation="relu", activate_output=True)),
        ({"use_dropout": True}, Structure(activate_output=True)),
        ({"use_dropout": True, "last_layer_dropout": True}, Structure(dropout=(0, 0.3, 0), activate_output=True)),
        (
            {"use_dropout": True, "layer_structure": [1, 2, 3, 4, 1]},
            Structure((1, 2, 3, 4, 1), activate_output=True, dropout=(0, 0.3, 0.3, 0, 0)),
        ),
        ({"use_dropout": False, "last_layer_dropout": True}, Structure(activate_output=True)),
        (
            {"use_dropout": True, "dropout_structure": [0, 0.05, 0]},
            Structure(activate_output=True, dropout=(0, 0.05, 0)),
        ),
        ({"use_dropout": False, "dropout_structure": [0, 0.05, 0]}, Structure(activate_output=True)),
        ({"is_layer_norm": True}, Structure(activate_output=True, layer_norm=True)),
    ],
)
def test_defaults_of_missing_settings(settings: dict[str, Any], expected: Structure) -> None:
    """METHODS §4.2, FORMATS §3.1: what A1111 takes a missing key for."""
    assert structure_of(settings) == expected


def comfyui(content: dict[Any, Any]) -> dict[str, nn.Sequential]:
    """What ComfyUI builds of a file (FORMATS §3.3): sizes from shapes, in the order of the keys."""
    kinds = {"relu": nn.ReLU, "swish": nn.Hardswish, "tanh": nn.Tanh, "mish": nn.Mish}
    built = {}
    for role, part in zip(("k", "v"), content[16], strict=True):
        names = [name.removesuffix(".weight") for name in part if name.endswith(".weight")]
        modules: list[nn.Module] = []
        for index, name in enumerate(names):
            weight, bias = part[f"{name}.weight"], part[f"{name}.bias"]
            if weight.ndim == 1:
                modules.append(nn.LayerNorm(len(weight)))
            else:
                modules.append(nn.Linear(weight.shape[1], weight.shape[0]))
            modules[-1].load_state_dict({"weight": weight, "bias": bias})
            activated = content["activate_output"] or index < len(names) - 1
            if weight.ndim == 2 and content["activation_func"] != "linear" and activated:
                modules.append(kinds[content["activation_func"]]())
        built[role] = nn.Sequential(*modules)
    return built


@pytest.mark.parametrize("activation", ["linear", "swish", "mish"])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activate_output", [False, True])
def test_comfyui_draws_alike_unless_it_is_said(
    exported, activation: str, layer_norm: bool, activate_output: bool
) -> None:
    """FORMATS §3.3."""
    section = {"activation": activation, "layer_norm": layer_norm, "activate_output": activate_output}
    _, paths = exported({**section, "dropout": [0, 0.3, 0]})
    stored, built = read(paths["pt"]), comfyui(torch.load(paths["pt"], weights_only=True))
    states = torch.randn(2, 3, 16, generator=generator(0, "states"))
    expected = answers(stored.network())
    alike = all(torch.equal(expected[role], states + built[role](states)) for role in built)
    assert alike == (comfyui_objection(stored.structure) is None)
    assert alike == (not failures(paths["pt"], against=["a1111", "comfyui"]))
    verify(paths["pt"]).require()  # A1111 reads it in any case


def test_what_comfyui_does_not_know_is_said(exported) -> None:
    """FORMATS §3.3: it logs and leaves the model unchanged."""
    _, paths = exported({"activation": "gelu"})
    details = {check.name: check.detail for check in verify(paths["pt"]).require().checks}
    assert details["comfyui"].startswith("A1111 only: it knows no activation 'gelu'")
    assert "reads no hypernetwork" in failures(paths["safetensors"], against=["comfyui"])["comfyui"]
    assert "reads no hypernetwork" in failures(paths["pt"], against=["kohya"])["kohya"]


def zeroed(tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor.zero_()


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda t: t.pop("16.k.linear.1.bias"), "keys"),
        (lambda t: t.update({"16.q.linear.0.weight": torch.ones(1)}), "settings"),
        (lambda t: t.update({"16.k.linear.9.weight": torch.ones(1)}), "keys"),
        (lambda t: t.update({"16.k.linear.0.weight": torch.ones(8, 16)}), "keys"),
        (lambda t: t["16.v.linear.0.weight"].view(-1).__setitem__(3, float("nan")), "finite"),
        (zeroed, "learned"),
        (lambda t: t["16.v.linear.0.weight"].mul_(2), "equal to memory"),
        (lambda t: t.clear(), "settings"),
    ],
    ids=["missing", "another role", "extra", "shape", "nan", "zero", "other numbers", "empty"],
)
def test_damage_is_named(exported, change, check: str) -> None:
    weights, paths = exported()
    path = paths["safetensors"]
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, header)
    assert check in failures(path, weights=weights)
    with pytest.raises(GuardError, match=r"zib\.safetensors"):
        verify(path, weights=weights).require()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"step": 3}, "holds no networks"),
        ({16: torch.zeros(2)}, "entry 16 is no pair"),
        ({16: ({}, {}, {})}, "entry 16 is no pair"),
        ({16: ({"linear.0.weight": 5}, {})}, "is no tensor"),
        ({16: ({"layer.0.weight": torch.zeros(2)}, {})}, "is no tensor of a hypernetwork"),
        ({**old_file(), "activation_func": "glu"}, "no activation 'glu'"),
        ({**old_file(), "layer_structure": 5}, "settings are no hypernetwork's"),
        ([1, 2], "holds no networks"),
    ],
)
def test_pickles_that_are_something_else(content: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        unpickled(content)


class Code:
    def __reduce__(self):
        return print, ("run",)


def test_code_in_a_pickle_is_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """METHODS §4.4: weights_only."""
    torch.save({16: ({}, {}), "name": Code()}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=r"bad\.pt"):
        read(tmp_path / "bad.pt")
    assert capsys.readouterr().out == ""


def test_what_never_moved_is_not_exported(recipe, tiny_sd: Path, tmp_path: Path) -> None:
    section = HypernetworkConfig(kind="hypernetwork")
    family = load_family(ModelConfig(path=str(tiny_sd)))
    one = recipe(recipe="hypernetwork", adapter=section.model_dump(), seed=4)
    weights = attach(section, family, 4).weights()
    with pytest.raises(GuardError, match="where it began"):
        export(weights, family, one, tmp_path)


def test_formats_and_names_are_the_recipe_s(exported) -> None:
    _, paths = exported(export={"formats": ["a1111"]})
    assert paths.keys() == {"pt"}


def draw(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    rng = generator(0, "sample", 0, 0)
    drawn = pipeline("a red star", num_inference_steps=2, guidance_scale=2.0, generator=rng, output_type="pt")
    return drawn.images


def test_diffusers_users_load_several_and_set_their_strengths(exported, tiny_sd: Path, tmp_path: Path) -> None:
    """METHODS §4.1: hypernetworks chain; strength 0 is the pipeline as it was; ``finetune sample`` draws the same."""
    _, paths = exported()
    other = Hypernetwork(Structure(), [16])
    initialise(other, "xavier_normal", 3)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    untouched = draw(pipeline)
    first = finetune.load_hypernetwork(pipeline, paths["pt"], strength=0.5)
    half = draw(pipeline)
    drawn = sample(paths["safetensors"], ["a red star"], strength=0.5, sampler=SamplerConfig(steps=2, guidance=2.0))[0]
    assert pipeline.numpy_to_pil(half.permute(0, 2, 3, 1).numpy())[0].tobytes() == drawn.tobytes()
    second = finetune.load_hypernetwork(pipeline, str(paths["safetensors"]), strength=1.0)
    both = draw(pipeline)
    second.multiplier = 0.0
    assert torch.equal(draw(pipeline), half)
    first.multiplier = 0.0
    assert torch.equal(draw(pipeline), untouched)
    assert not torch.equal(both, half) and not torch.equal(half, untouched)


def test_what_does_not_fit_a_pipeline_is_said(tiny_sd: Path, tmp_path: Path) -> None:
    """METHODS §4.6: widths that are not in the model are an error."""
    write_pickle(tmp_path / "other.pt", old_file(768))
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    with pytest.raises(UserError, match=r"other\.pt: a hypernetwork of width 768 would never be used"):
        finetune.load_hypernetwork(pipeline, tmp_path / "other.pt")
    with pytest.raises(UserError, match="has no U-Net"):
        finetune.load_hypernetwork(object(), tmp_path / "other.pt")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors: is no hypernetwork"):
        finetune.load_hypernetwork(pipeline, tmp_path / "a.safetensors")


def test_a_foreign_pickle_needs_a_base_to_be_verified_against(tiny_sd: Path, tmp_path: Path) -> None:
    write_pickle(tmp_path / "old.pt", {**old_file(), "sd_checkpoint_name": "v1-5-pruned"})
    assert verify(tmp_path / "old.pt", base=str(tiny_sd)).passed
    with pytest.raises(UserError, match="--base"):
        verify(tmp_path / "old.pt")
