"""Single-file checkpoints as base models: recognised, converted once, offline."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from single_files import SingleFile, base, rewritten
from torch import Tensor

from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import at_hand, load_family, model_folder
from finetune.families.single_file import convert
from finetune.families.single_file.layouts import LAYOUTS
from finetune.files import model_cache
from finetune.tinyworld.tokenizer import build


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


def test_a_file_that_is_there_is_at_hand_whatever_the_hub_has(tiny_sd: Path, single_file: SingleFile) -> None:
    file = single_file(tiny_sd)
    assert at_hand(ModelConfig(path=str(file)))
    assert not at_hand(ModelConfig(path=str(file.with_name("gone.safetensors"))))


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
    models = model_cache()
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
