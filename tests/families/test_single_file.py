"""Single-file checkpoints as base models: recognised, converted once, offline, or refused with the reason."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import families, flux, load_family, model_folder, sd3, sdxl
from finetune.families.single_file import convert
from finetune.families.single_file.checkpoint import Checkpoint, Stored, read_checkpoint
from finetune.families.single_file.layouts import DENOISER, FLUX, LAYOUTS, SD1, SD2, SD3, SDXL, Layout
from finetune.families.single_file.network import network, weights_of
from finetune.families.single_file.published import documents
from finetune.families.single_file.template import template
from finetune.originals import Place
from finetune.originals.tensors import fill
from finetune.tinyworld.tokenizer import build

SingleFile = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a file was looked for on the network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def twins(tiny_sd: Path, tiny_sd_v: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each layout; that of SD 2 has OpenCLIP's activation, by which it is known."""
    folder = tmp_path_factory.mktemp("twins")
    second = Path(shutil.copytree(tiny_sd_v, folder / "sd2"))
    change(second / "text_encoder" / "config.json", hidden_act="gelu")
    return {
        SD1.name: tiny_sd,
        SD2.name: second,
        SDXL.name: sdxl.tiny(folder / "sdxl"),
        SD3.name: sd3.tiny(folder / "sd3"),
        FLUX.name: flux.tiny(folder / "flux"),
    }


def base(path: Path, **settings: Any) -> Any:
    """The family of a single file."""
    return load_family(ModelConfig(path=str(path), **settings))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def rewritten(file: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """``file`` with its tensors changed by ``edit``."""
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    edit(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata)
    return file


@pytest.mark.parametrize("name", [layout.name for layout in LAYOUTS])
def test_every_weight_arrives_and_answers_are_the_folders(
    name: str, twins: dict[str, Path], single_file: SingleFile
) -> None:
    wanted, found = (
        load_family(ModelConfig(path=str(twins[name]))),
        base(single_file(twins[name]), like=str(twins[name])),
    )
    assert (found.name, type(found.process)) == (wanted.name, type(wanted.process))
    assert found.process.prediction == wanted.process.prediction
    for family in (wanted, found):
        family.require(*family.parts)  # type: ignore[attr-defined]
    moved = []
    for name, module in wanted.networks.items():
        there = found.networks[name].state_dict()
        for key, value in module.state_dict().items():
            if not torch.equal(there[key], value):
                assert torch.equal(there[key], value + 1)
                moved.append(name)
    assert moved == ["denoiser"]
    ours, theirs = (family.encode_prompt(["a red star", ""]) for family in (found, wanted))
    assert torch.equal(ours.tokens, theirs.tokens)
    assert ours.pooled is theirs.pooled or torch.equal(ours.pooled, theirs.pooled)


def test_half_precision_is_kept_on_disk_and_trained_in_single(tiny_sd: Path, single_file: SingleFile) -> None:
    found = base(single_file(tiny_sd, dtype=torch.float16), like=str(tiny_sd))
    found.require("denoiser", "vae", "text_encoder")
    assert {value.dtype for value in found.networks.parameters()} == {torch.float32}
    stored = load_file(found.folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert torch.equal(
        found.networks["vae"].state_dict()["quant_conv.bias"].half(), half(tiny_sd, "vae", "quant_conv.bias")
    )


def half(folder: Path, part: str, key: str) -> Tensor:
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")[key].half()


def test_it_is_converted_once_whatever_it_is_called(
    tiny_sd: Path, single_file: SingleFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = single_file(tiny_sd)
    first = base(file, like=str(tiny_sd))
    digest = first.fingerprint("denoiser", "vae", "text_encoder")
    monkeypatch.setattr(convert, "_write", lambda *_: pytest.fail("converted again"))
    again = base(file.rename(file.with_name("dreamshaper_8.safetensors")), like=str(tiny_sd))
    assert again.folder == first.folder
    assert again.fingerprint("denoiser", "vae", "text_encoder") == digest


def test_equal_files_are_equal_folders_and_another_content_is_another(
    tiny_sd: Path, single_file: SingleFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = single_file(tiny_sd)
    config = ModelConfig(path=str(file), like=str(tiny_sd))
    one = model_folder(config)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "elsewhere"))
    two = model_folder(config)
    assert one.name == two.name and one != two
    for path in sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file()):
        assert (one / path).read_bytes() == (two / path).read_bytes(), path
    rewritten(file, lambda tensors: tensors["model.diffusion_model.out.2.bias"].add_(1))
    assert model_folder(config).name != one.name


def test_of_several_at_once_one_writes(
    tiny_sd: Path, single_file: SingleFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(path=str(single_file(tiny_sd)), like=str(tiny_sd))
    written, ready, own = [], threading.Barrier(3), convert._write
    digest = convert.file_digest

    def meet(path: Path) -> str:
        ready.wait(30)
        return digest(path)

    def count(*arguments: Any) -> None:
        written.append(arguments)
        own(*arguments)

    monkeypatch.setattr(convert, "file_digest", meet)
    monkeypatch.setattr(convert, "_write", count)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(model_folder(config))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1
    assert len(found) == 3 and len(set(found)) == 1


def test_a_conversion_that_fails_leaves_nothing_and_one_that_was_killed_is_cleared_away(
    tiny_sd: Path, single_file: SingleFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(path=str(single_file(tiny_sd)), like=str(tiny_sd))
    own, calls = convert.stream_tensors, []

    def fail(*arguments: Any) -> None:
        calls.append(arguments)
        own(*arguments)
        if len(calls) == 2:
            raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(convert, "stream_tensors", fail)
        with pytest.raises(OSError, match="no space"):
            model_folder(config)
    models = convert.shelf()
    assert [path.suffix for path in models.iterdir()] == [".lock"]
    name = next(models.iterdir()).stem
    left = models / f".partial-0123abcd-{name}"
    left.mkdir()
    folder = model_folder(config)
    assert folder.name == name and not left.exists()


def test_what_other_tools_leave_out_or_add_is_no_matter(tiny_sd: Path, single_file: SingleFile) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if ".text_model." in key]:
            tensors[key.replace(".text_model.", ".")] = tensors.pop(key)
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(24)[None]
        tensors["cond_stage_model.logit_scale"] = torch.ones(())
        tensors["model_ema.decay"] = torch.ones(())
        tensors["model_ema.diffusion_modelout2bias"] = torch.ones(4)
        tensors["first_stage_model.loss.logvar"] = torch.ones(())
        tensors["alphas_cumprod"] = torch.ones(1000)
        for side in ("encoder", "decoder"):  # some tools keep them as the linear layers that they are
            key = f"first_stage_model.{side}.mid.attn_1.q.weight"
            tensors[key] = tensors[key].flatten(1)

    found = base(rewritten(single_file(tiny_sd), edit), like=str(tiny_sd))
    found.require("text_encoder", "vae")
    wanted = load_family(ModelConfig(path=str(tiny_sd)))
    wanted.require("text_encoder", "vae")
    for part in ("text_encoder", "vae"):
        for key, value in wanted.networks[part].state_dict().items():
            assert torch.equal(found.networks[part].state_dict()[key], value)


def test_a_file_of_ours_knows_its_base(tiny_sd: Path, single_file: SingleFile) -> None:
    found = base(single_file(tiny_sd, finetune__base=str(tiny_sd)))
    assert found.tokenizer.get_vocab() == build().get_vocab()
    with pytest.raises(UserError, match=r"model\.like is missing"):
        base(single_file(tiny_sd, name="moved.safetensors", finetune__base="/nowhere/model"))


def test_a_file_that_was_trained_from_a_file_finds_the_first_ones_base(
    tiny_sd: Path, single_file: SingleFile, tmp_path: Path
) -> None:
    single_file(tiny_sd, name="one.safetensors", finetune__like=str(tiny_sd))
    last = single_file(tiny_sd, name="two.safetensors", finetune__base=str(tmp_path / "one.safetensors"))
    assert base(last).tokenizer.get_vocab() == build().get_vocab()
    circle = {"finetune__base": str(tmp_path / "two.safetensors")}
    single_file(tiny_sd, name="one.safetensors", **circle)
    with pytest.raises(UserError, match=r"model\.like is missing"):
        base(last)


# what a file may lack


def without(*prefixes: str) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(prefixes)]:
            del tensors[key]

    return edit


def bare(tensors: dict[str, Tensor]) -> None:
    """As FLUX.1 was published: the transformer, whose keys have no prefix."""
    for key in list(tensors):
        value = tensors.pop(key)
        if key.startswith(DENOISER):
            tensors[key.removeprefix(DENOISER)] = value


def equal(found: Any, wanted: Any, part: str) -> bool:
    there, here = (family.fresh(part).state_dict() for family in (found, wanted))
    return there.keys() == here.keys() and all(torch.equal(there[key], here[key]) for key in here)


@pytest.mark.parametrize("name", [SD3.name, FLUX.name])
def test_a_transformer_alone_takes_the_rest_from_another_model(
    name: str, twins: dict[str, Path], single_file: SingleFile
) -> None:
    folder, whole = twins[name], single_file(twins[name], name="whole.safetensors")
    file = rewritten(single_file(folder), bare)
    found, wanted = base(file, like=str(folder)), base(whole, like=str(folder))
    assert all(equal(found, wanted, part) for part in wanted.parts)
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert (found.folder / weights).samefile(folder / weights), "large files are not copied"
    named = "holds no vae, text_encoder, text_encoder_2.* and no settings and no tokenizers"
    with pytest.raises(UserError, match=rf"model\.like is missing.*{named}.*{name}"):
        base(file)


def test_what_the_other_model_lacks_is_named(twins: dict[str, Path], single_file: SingleFile, tmp_path: Path) -> None:
    file = rewritten(single_file(twins[FLUX.name]), bare)
    like = Path(shutil.copytree(twins[FLUX.name], tmp_path / "like"))
    (like / "vae" / "diffusion_pytorch_model.safetensors").rename(like / "vae" / "model.fp16.safetensors")
    with pytest.raises(UserError, match=r"model\.like: .*like has no safetensors of the vae, and .* holds none"):
        base(file, like=str(like))


@pytest.mark.parametrize("there", [True, False])
def test_sd3_may_have_no_t5(there: bool, twins: dict[str, Path], single_file: SingleFile, tmp_path: Path) -> None:
    like = Path(shutil.copytree(twins[SD3.name], tmp_path / "like"))
    change(like / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    for folder in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(like / folder)
    file = single_file(twins[SD3.name])
    if there:
        with pytest.raises(UserError, match=r"model\.like: .* has no text_encoder_3, which .* holds"):
            base(file, like=str(like))
    else:
        found = base(rewritten(file, without("text_encoders.t5xxl.")), like=str(like))
        assert "text_encoder_3" not in found.parts
        assert equal(found, base(single_file(like, name="other.safetensors"), like=str(like)), "text_encoder_2")


def test_what_is_not_said_of_clips_projection_is_the_identity(twins: dict[str, Path], single_file: SingleFile) -> None:
    key = "text_encoders.clip_l.transformer.text_projection.weight"
    file = rewritten(single_file(twins[SD3.name]), lambda tensors: tensors.pop(key))
    found = base(file, like=str(twins[SD3.name]))
    assert torch.equal(found.fresh("text_encoder").text_projection.weight, torch.eye(16))
    file = rewritten(file, lambda tensors: tensors.pop(key.replace("clip_l", "clip_g")))
    with pytest.raises(UserError, match=r"text_encoder_2 lacks 1 tensors.*clip_g.*text_projection"):
        base(file, like=str(twins[SD3.name]))


def test_numbers_of_8_bits_are_read_without_loss(twins: dict[str, Path], single_file: SingleFile) -> None:
    kinds = {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.float8_e4m3fn, "shared.weight": torch.float8_e5m2}
    stored: dict[str, Tensor] = {}

    def edit(tensors: dict[str, Tensor]) -> None:
        for name, kind in kinds.items():
            key = f"text_encoders.t5xxl.transformer.{name}"
            stored[name] = tensors[key] = tensors[key].to(kind)

    found = base(rewritten(single_file(twins[FLUX.name]), edit), like=str(twins[FLUX.name])).fresh("text_encoder_2")
    for name, value in stored.items():
        assert torch.equal(found.get_parameter(name), value.float())


def test_the_autoencoder_of_flux_has_two_prefixes(twins: dict[str, Path], single_file: SingleFile) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith("vae.")]:
            tensors["first_stage_model." + key.removeprefix("vae.")] = tensors.pop(key)

    folder = str(twins[FLUX.name])
    found = base(rewritten(single_file(twins[FLUX.name]), edit), like=folder)
    assert equal(found, load_family(ModelConfig(path=folder)), "vae")


def test_a_file_that_was_trained_from_a_hub_model_finds_it_in_the_cache(
    twins: dict[str, Path], single_file: SingleFile, hub: Path
) -> None:
    shutil.copytree(twins[FLUX.name], hub.parents[2] / "models--owner--flux" / "snapshots" / "abc")
    (hub.parents[2] / "models--owner--flux" / "refs").mkdir()
    (hub.parents[2] / "models--owner--flux" / "refs" / "main").write_text("abc")
    found = base(single_file(twins[FLUX.name], finetune__base="owner/flux"))
    assert found.name == "flux"
    with pytest.raises(UserError, match=r"model\.like is missing"):
        base(single_file(twins[FLUX.name], finetune__base="owner/another"))


# what is predicted


@pytest.mark.parametrize(
    ("metadata", "key", "setting", "expected"),
    [
        ({}, None, None, "epsilon"),
        ({}, "v_pred", None, "v_prediction"),
        ({"modelspec__prediction_type": "v"}, None, None, "v_prediction"),
        ({"modelspec__predict_key": "v"}, None, None, "v_prediction"),
        ({"modelspec__prediction_type": "epsilon"}, None, "v_prediction", "v_prediction"),
        ({}, None, "v_prediction", "v_prediction"),
    ],
)
def test_what_a_file_predicts(
    metadata: dict[str, str],
    key: str | None,
    setting: Any,
    expected: str,
    twins: dict[str, Path],
    single_file: SingleFile,
) -> None:
    folder = twins[SDXL.name]
    file = single_file(folder, **metadata)
    if key:
        rewritten(file, lambda tensors: tensors.update({key: torch.zeros(0)}))
    found = template(read_checkpoint(file), ModelConfig(path=str(file), like=str(folder), prediction=setting))
    assert found.documents["scheduler/scheduler_config.json"]["prediction_type"] == expected


def test_the_settings_beside_a_file_say_it_and_recipes_do_not(tiny_sd: Path, single_file: SingleFile) -> None:
    file = single_file(tiny_sd)
    settings = file.with_suffix(".yaml")
    for text, expected in (
        ("model: {params: {parameterization: v}}", "v_prediction"),
        ("model: {params: {timesteps: 1000}}", "epsilon"),
        ("model: {path: model.safetensors}", "epsilon"),
        ("[not, settings", "epsilon"),
    ):
        settings.write_text(text)
        assert base(file, like=str(tiny_sd)).process.prediction == expected
    settings.write_text("model: {params: {parameterization: velocity}}")
    with pytest.raises(UserError, match="'velocity'; expected v or eps"):
        base(file, like=str(tiny_sd))


def test_zero_terminal_snr_is_read_as_comfyui_reads_it(twins: dict[str, Path], single_file: SingleFile) -> None:
    folder = twins[SDXL.name]
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    found = base(rewritten(single_file(folder), lambda tensors: tensors.update(marks)), like=str(folder))
    settings = found.scheduler().config
    assert settings["rescale_betas_zero_snr"] and settings["timestep_spacing"] == "trailing"
    assert float(found.process.alphas_cumprod[-1]) == pytest.approx(0, abs=1e-6)


def test_of_sd2_it_must_be_said(twins: dict[str, Path], single_file: SingleFile, hub: Path) -> None:
    file = single_file(twins[SD2.name])
    rewritten(file, lambda tensors: tensors.pop("v_pred"))
    config = ModelConfig(path=str(file))
    with pytest.raises(UserError, match=r"model\.prediction is missing.*768 pixels.*v_prediction"):
        template(read_checkpoint(file), config)


# what belongs to a published model


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with a CLIP's vocabulary in it, that of the embedded world."""
    folder = tmp_path / "hub" / "models--openai--clip-vit-large-patch14"
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    tokenizer = json.loads(build().backend_tokenizer.to_str())["model"]
    (snapshot / "vocab.json").write_text(json.dumps(tokenizer["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in tokenizer["merges"])
    (snapshot / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder.parent))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(folder.parent), raising=False)
    return snapshot


def published(layout: Layout) -> Checkpoint:
    """A file of the published sizes, none of whose bytes is there."""
    tensors: dict[str, Stored] = {}
    for part in families()[layout.family].parts.values():
        settings, component = (
            documents(layout, "epsilon")[f"{part.subfolder}/config.json"],
            layout.components[part.subfolder],
        )
        weights = {component.full(name): value for name, value in weights_of(part, settings).items()}
        held: dict[str, tuple[list[Place], list[Tensor]]] = {}
        for name, place in layout.places(part.subfolder, weights, settings).items():
            places, parts = held.setdefault(place.path, ([], []))
            places.append(place)
            parts.append(weights[name])
        tensors |= {key: Stored(key, tuple(fill(*pieces).shape), "F16") for key, pieces in held.items()}
    return Checkpoint(Path("model.safetensors"), layout, tensors, {})


@pytest.mark.parametrize(
    ("layout", "prediction", "multiple", "sample_size", "scheduler"),
    [
        (SD1, None, 64, 64, "PNDMScheduler"),
        (SD2, "epsilon", 64, 64, "DDIMScheduler"),
        (SD2, "v_prediction", 64, 96, "DDIMScheduler"),
        (SDXL, None, 32, 128, "EulerDiscreteScheduler"),
        (SDXL, "v_prediction", 32, 128, "EulerDiscreteScheduler"),
    ],
)
def test_the_published_models_need_nothing_but_clips_vocabulary(
    layout: Layout, prediction: Any, multiple: int, sample_size: int, scheduler: str, hub: Path, tmp_path: Path
) -> None:
    checkpoint = published(layout)
    found = template(checkpoint, ModelConfig(path="model.safetensors", prediction=prediction))
    for part in found.parts.values():
        network(checkpoint, found, part)  # every weight is of the settings' shape
    found.write(tmp_path / "model")
    family: Any = load_family(ModelConfig(path=str(tmp_path / "model")))
    assert (family.name, family.pixel_multiple) == (layout.family, multiple)
    assert family.process.prediction == (prediction or "epsilon")
    assert family.settings["denoiser"]["sample_size"] == sample_size
    assert type(family.scheduler()).__name__ == scheduler
    openclip = {SD1: [], SD2: ["text_encoder"], SDXL: ["text_encoder_2"]}[layout]
    for name, tokenizer in family.tokenizers.items():
        assert tokenizer.pad_token == ("!" if name in openclip else "<|endoftext|>")
    for one in family.tokenizers.values():
        assert one.model_max_length == 77
        assert one("a red star")["input_ids"] == build()("a red star")["input_ids"]


def test_the_tokenizer_is_asked_for_where_none_is_found(tiny_sd: Path, single_file: SingleFile, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.like is missing.*no tokenizer.*hf download openai/clip-vit-large"):
        model_folder(ModelConfig(path=str(single_file(tiny_sd))))
    assert not convert.shelf().exists()


def test_another_size_than_the_published_is_named(
    tiny_sd: Path, single_file: SingleFile, hub: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"unet lacks \d+ tensors.*as it was published.*model\.like"):
        base(single_file(tiny_sd))
    assert [path.suffix for path in convert.shelf().iterdir()] == [".lock"]


# what is refused


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_pickles_are_never_opened(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(UserError, match=r"is a pickle, which can run any code.*\.safetensors"):
        model_folder(ModelConfig(path=str(file)))


def put(**tensors: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda held: held.update({key.replace("__", "."): value for key, value in tensors.items()})


def only(**tensors: Tensor) -> Callable[[dict[str, Tensor]], None]:
    def edit(held: dict[str, Tensor]) -> None:
        held.clear()
        put(**tensors)(held)

    return edit


ONE = torch.ones(1)
FIRST = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (without("cond_stage_model."), "holds a U-Net and no text encoder"),
        (only(lora_unet_mid_block__lora_down__weight=ONE), "holds an adapter"),
        (only(conditioner__embedders__0__model__ln_final__weight=ONE), "SDXL's refiner"),
        (only(double_blocks__0__img_attn__qkv__weight=ONE), "its first key is 'double_blocks"),
        (put(edm_mean=ONE), "EDM's"),
        (lambda tensors: tensors.update({FIRST: torch.ones(16, 9, 3, 3)}), "9 input channels.*inpainting"),
        (put(model__diffusion_model__label_emb__weight=ONE), "1 tensors too many.*label_emb"),
        (lambda tensors: tensors.pop("model.diffusion_model.out.2.bias"), r"lacks 1 tensors.*out\.2\.bias"),
        (
            lambda tensors: tensors.update({"model.diffusion_model.out.2.bias": torch.ones(5)}),
            r"makes a weight of \[5\]; expected \[4\]",
        ),
        (lambda tensors: tensors.update({FIRST: tensors[FIRST].to(torch.uint8)}), "is U8; expected one of"),
        (put(model__diffusion_model__out__2__scale_weight=ONE), "numbers are packed"),
        (only(down_blocks__0__resnets__0__conv1__weight=ONE), "is one network of a diffusers folder"),
    ],
)
def test_what_cannot_be_trained_says_why(
    edit: Callable[[dict[str, Tensor]], object],
    said: str,
    tiny_sd: Path,
    single_file: SingleFile,
) -> None:
    file = rewritten(single_file(tiny_sd), edit)
    with pytest.raises(UserError, match=said):
        base(file, like=str(tiny_sd))


def test_a_transformer_that_reads_more_than_latents_is_refused(twins: dict[str, Path], single_file: SingleFile) -> None:
    edits = put(model__diffusion_model__img_in__weight=torch.ones(16, 128))
    with pytest.raises(UserError, match=r"128 input channels.*control models cannot be trained"):
        base(rewritten(single_file(twins[FLUX.name]), edits), like=str(twins[FLUX.name]))


def test_flow_models_predict_one_thing(twins: dict[str, Path], single_file: SingleFile) -> None:
    with pytest.raises(UserError, match=r"model\.prediction has no meaning for FLUX\.1"):
        base(single_file(twins[FLUX.name]), like=str(twins[FLUX.name]), prediction="epsilon")


def test_a_file_that_is_cut_off_is_refused(tiny_sd: Path, single_file: SingleFile) -> None:
    file = single_file(tiny_sd)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="no whole safetensors file"):
        base(file, like=str(tiny_sd))


def test_a_model_of_another_kind_is_not_like_it(twins: dict[str, Path], single_file: SingleFile) -> None:
    with pytest.raises(UserError, match=r"model\.like:.*another kind of model.*Stable Diffusion 1\.x"):
        base(single_file(twins[SD1.name]), like=str(twins[SDXL.name]))


@pytest.mark.parametrize("setting", [{"like": "tinyworld"}, {"prediction": "epsilon"}])
def test_settings_of_single_files_are_for_single_files(setting: dict[str, Any], tiny_sd: Path) -> None:
    for path in (str(tiny_sd), "tinyworld"):
        with pytest.raises(UserError, match=r"is for a single file, and '.*' is none"):
            model_folder(ModelConfig(path=path, **setting))


def test_a_file_that_is_not_there_names_its_neighbour(
    tiny_sd: Path, single_file: SingleFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    single_file(tiny_sd, name="dreamshaper.safetensors")
    monkeypatch.chdir(tmp_path)
    for path in ("dreamshape.safetensors", "models/dreamshaper.safetensors"):  # neither is a hub name
        with pytest.raises(UserError, match=r"no folder or file"):
            model_folder(ModelConfig(path=path))
    with pytest.raises(UserError, match=r"did you mean 'dreamshaper\.safetensors'"):
        model_folder(ModelConfig(path=str(tmp_path / "dreamshape.safetensors")))
