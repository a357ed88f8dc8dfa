"""Files of aesthetic embeddings: FORMATS 4 key by key, and METHODS 5.2's artefact."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import finetune
from finetune.adapter import Weights
from finetune.aesthetic import Aesthetic, mean_embedding
from finetune.config.schema import ModelConfig, Recipe, SamplerConfig
from finetune.errors import UserError
from finetune.export import export, identify, verify
from finetune.export.aesthetic import weights_of
from finetune.export.kinds.aesthetic import apply
from finetune.export.pickles import write_pickle
from finetune.export.read import pieces
from finetune.export.sample import adapted, sample
from finetune.families import load_family
from finetune.families.clip import encoder_digest
from finetune.families.tiny import write_tiny_clip, write_tiny_sd

PROMPT = "a red star on grass"


@pytest.fixture(scope="module")
def clip(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip") / "clip", tiny_sd)


@pytest.fixture
def weights(tiny_family: Any, clip: Path) -> Weights:
    space = tiny_family.sites.shared_space(str(clip))
    vectors = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    aesthetic = Aesthetic(mean_embedding(vectors), space.projection, 3, 1e-3, 0.8)
    return weights_of(aesthetic, str(clip), space.encoder, 5)


@pytest.fixture
def written(
    weights: Weights, recipe: Callable[..., Recipe], tiny_family: Any, clip: Path, tmp_path: Path
) -> dict[str, Path]:
    """The two files, by layout."""
    adapter = {"kind": "aesthetic", "clip": str(clip), "steps": 3, "learning_rate": 1e-3}
    paths = export(weights, tiny_family, recipe(recipe="aesthetic", adapter=adapter, report=SHOWN), tmp_path / "out")
    return dict(zip(("diffusers", "a1111"), paths, strict=True))


SHOWN = {"prompts": [PROMPT]}


@pytest.fixture
def pipeline(tiny_sd: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)


def encode(pipeline: Any) -> torch.Tensor:
    with torch.no_grad():
        return pipeline.encode_prompt(PROMPT, "cpu", 1, False)[0]


def test_our_file_key_by_key(written: dict[str, Path], weights: Weights, tiny_sd: Path, clip: Path) -> None:
    """FORMATS 4, last line: image_embedding, and a header with the CLIP, the number of pictures and the encoder."""
    assert written["diffusers"].name == "zib.safetensors"
    tensors = load_file(written["diffusers"])
    assert tensors.keys() == {"image_embedding", "text_projection"}
    assert tensors["image_embedding"].shape == (1, 8)
    assert torch.equal(tensors["image_embedding"], weights.tensors["image_embedding"])
    with safe_open(written["diffusers"], "pt") as file:
        header = file.metadata()
    encoder = load_family(ModelConfig(path=str(tiny_sd))).fresh("text_encoder")
    wanted = {
        "aesthetic.clip_model": str(clip),
        "aesthetic.num_images": "5",
        "aesthetic.normalized": "false",
        "aesthetic.encoder": encoder_digest(encoder),
        "aesthetic.steps": "3",
        "aesthetic.learning_rate": "0.001",
        "aesthetic.weight": "0.8",
        "aesthetic.mix": "lerp",
        "finetune.base": str(tiny_sd),
    }
    assert {name: header.get(name) for name in wanted} == wanted


def test_a1111s_file_is_a_bare_float32_tensor(written: dict[str, Path], weights: Weights) -> None:
    """FORMATS 4: float32 [1, d], on the CPU, contiguous, a zip without extras; torch and A1111's check read it."""
    assert written["a1111"].name == "zib.pt"
    held = torch.load(written["a1111"], weights_only=True)
    assert isinstance(held, torch.Tensor)
    assert (held.dtype, held.shape, held.device.type) == (torch.float32, (1, 8), "cpu")
    assert held.is_contiguous()
    assert torch.equal(held, weights.tensors["image_embedding"])
    with zipfile.ZipFile(written["a1111"]) as archive:
        assert sorted(archive.namelist()) == ["archive/data.pkl", "archive/data/0", "archive/version"]


def test_both_files_are_recognised_and_verify(written: dict[str, Path], weights: Weights, tiny_sd: Path) -> None:
    for layout, path in written.items():
        found = identify(path)
        assert (found.kind, found.layout) == ("aesthetic", layout)
        assert verify(path, weights=weights).require()
    names = {check.name for check in verify(written["diffusers"]).checks}
    assert names == {"readable", "finite", "text encoder", "diffusers"}
    refused = verify(written["a1111"], base=str(tiny_sd))
    assert not any(check.name == "equal to memory" for check in refused.checks)


def test_equal_embeddings_are_equal_bytes(
    weights: Weights, recipe: Callable[..., Recipe], tiny_family: Any, clip: Path, tmp_path: Path
) -> None:
    adapter = {"kind": "aesthetic", "clip": str(clip)}
    one, two = (
        export(weights, tiny_family, recipe(recipe="aesthetic", adapter=adapter, report=SHOWN), tmp_path / name)
        for name in ("one", "two")
    )
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_verification_finds_another_embedding_and_another_reader(written: dict[str, Path], weights: Weights) -> None:
    moved = Weights("aesthetic", {name: tensor + 1 for name, tensor in weights.tensors.items()}, weights.settings)
    for path in written.values():
        assert {check.name for check in verify(path, weights=moved).checks if not check.passed} == {"equal to memory"}
        assert not verify(path, against=["comfyui"]).passed


@pytest.mark.parametrize("held", [torch.zeros(2, 8), torch.tensor(1.0), torch.full((1, 8), torch.nan)])
def test_verification_finds_what_is_no_embedding(held: torch.Tensor, tmp_path: Path) -> None:
    write_pickle(tmp_path / "a.pt", held)
    assert not verify(tmp_path / "a.pt").passed


def test_another_text_encoder_is_refused(written: dict[str, Path], tmp_path: Path) -> None:
    """METHODS 5.2: an embedding is for the encoder whose CLIP saw the pictures; the header's hash tells."""
    other = write_tiny_sd(tmp_path / "other", seed=1)
    pipeline: Any = StableDiffusionPipeline.from_pretrained(other, safety_checker=None)
    with pytest.raises(UserError, match="is for another text encoder"):
        finetune.load_aesthetic(pipeline, written["diffusers"])
    assert "encode_prompt" not in vars(pipeline)
    found = verify(written["diffusers"], base=str(other))
    assert [check.name for check in found.checks if not check.passed] == ["text encoder"]


def test_users_of_diffusers_load_either_file(written: dict[str, Path], pipeline: Any, clip: Path) -> None:
    plain = encode(pipeline)
    with finetune.load_aesthetic(pipeline, written["diffusers"]):
        ours = encode(pipeline)
    settings = {"steps": 3, "learning_rate": 1e-3, "weight": 0.8}
    with finetune.load_aesthetic(pipeline, written["a1111"], clip=str(clip), **settings):
        theirs = encode(pipeline)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, plain)
    assert torch.equal(encode(pipeline), plain)


def test_files_of_others_may_be_flat_or_half(written: dict[str, Path], pipeline: Any, clip: Path) -> None:
    """FORMATS 4: samples in the wild are [1, d] and [d], float16 and float32."""
    held = torch.load(written["a1111"], weights_only=True)
    shapes = (held[0], held.half(), held)
    for number, tensor in enumerate(shapes):
        write_pickle(written["a1111"].with_name(f"{number}.pt"), tensor.clone())
    made = []
    for number in range(3):
        path = written["a1111"].with_name(f"{number}.pt")
        with finetune.load_aesthetic(pipeline, path, clip=str(clip), steps=1):
            made.append(encode(pipeline))
    assert torch.equal(made[0], made[2])
    torch.testing.assert_close(made[1], made[2], rtol=1e-2, atol=1e-2)


def test_values_that_cannot_be_are_refused(written: dict[str, Path], pipeline: Any, tmp_path: Path) -> None:
    for wrong in ({"weight": 1.5}, {"steps": -1}, {"learning_rate": 0.0}, {"mix": "blur"}):
        with pytest.raises(UserError, match=r"expected|from 0 to 1"):
            finetune.load_aesthetic(pipeline, written["diffusers"], **wrong)
    with pytest.raises(UserError, match=r"adapter\.clip is missing"):
        finetune.load_aesthetic(pipeline, written["a1111"])
    save_file({"unet.a.lora_A.weight": torch.zeros(1, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="holds no aesthetic embedding"):
        finetune.load_aesthetic(pipeline, tmp_path / "lora.safetensors")


def test_strength_multiplies_the_files_weight(written: dict[str, Path], pipeline: Any) -> None:
    plain = encode(pipeline)
    made = {}
    for strength in (0.0, 0.5, 1.0):
        apply(pipeline, identify(written["diffusers"]), strength)
        made[strength] = encode(pipeline)
        del pipeline.encode_prompt
    assert torch.equal(made[0.0], plain)
    torch.testing.assert_close(made[0.5], (made[0.0] + made[1.0]) / 2)
    with finetune.load_aesthetic(pipeline, written["diffusers"], weight=0.8):
        assert torch.equal(encode(pipeline), made[1.0])


def test_sample_draws_with_the_embedding(written: dict[str, Path], pipeline: Any) -> None:
    """``finetune sample`` is diffusers' own pipeline with the file loaded, bit for bit."""
    from finetune.randomness import generator

    sampler = SamplerConfig(steps=2, guidance=3.0)
    (ours,) = sample(written["diffusers"], [PROMPT], seed=4, sampler=sampler)
    (base,) = sample(written["diffusers"], [PROMPT], seed=4, sampler=sampler, strength=0.0)
    with finetune.load_aesthetic(pipeline, written["diffusers"]):
        theirs = pipeline(PROMPT, num_inference_steps=2, guidance_scale=3.0, generator=generator(4, "sample", 0, 0))
    assert ours.tobytes() == theirs.images[0].tobytes()
    assert ours.tobytes() != base.tobytes()


def test_a_folder_with_a1111s_file_alone_can_be_drawn_with(
    written: dict[str, Path], tiny_sd: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(written["a1111"], folder)
    (found,) = pieces(folder)
    assert found.layout == "a1111"
    with pytest.raises(UserError, match=r"adapter\.clip is missing"):  # a bare tensor does not say whose it is
        adapted(folder, str(tiny_sd))


def test_importing_the_package_alone_loads_no_torch() -> None:
    import subprocess
    import sys

    check = "import sys, finetune; assert 'torch' not in sys.modules; assert callable(finetune.load_aesthetic)"
    subprocess.run([sys.executable, "-c", check], check=True)
    with pytest.raises(AttributeError):
        _ = finetune.load_aesthetics
