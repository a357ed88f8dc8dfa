"""What files say of themselves: ModelSpec, kohya's fields, the recipe, a picture."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from finetune import formats
from finetune.export import export, verify
from finetune.export.cover import put_cover
from finetune.export.inspect import inspect
from finetune.export.metadata import describe, locked
from finetune.export.read import read_header, read_tensors
from finetune.families import load_family

REQUIRED = ("sai_model_spec", "architecture", "implementation", "title", "resolution")

ARCHITECTURES = {
    "flux": ("flux-1-custom", {"num_attention_heads": 24, "attention_head_dim": 128}, "flux-1-schnell"),
    "sd3": (
        "stable-diffusion-3-custom",
        {"num_attention_heads": 38, "qk_norm": "rms_norm"},
        "stable-diffusion-3-5-large",
    ),
    "sdxl": ("stable-diffusion-xl-custom", {"cross_attention_dim": 2048}, "stable-diffusion-xl-v1-base"),
    "sd": ("stable-diffusion-custom", {"cross_attention_dim": 768}, "stable-diffusion-v1"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_the_published_one_or_the_familys_own(
    name: str, twins: Callable[[str], Path], tmp_path: Path
) -> None:
    import shutil

    custom, settings, published = ARCHITECTURES[name]
    family = load_family(formats.ModelConfig(path=str(twins(name))))
    assert family.published.architecture == custom
    folder = Path(shutil.copytree(twins(name), tmp_path / "model"))
    config = folder / family.components["denoiser"] / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "guidance_embeds": False, **settings}))
    assert load_family(formats.ModelConfig(path=str(folder))).published.architecture == published


@pytest.mark.parametrize("method", formats.METHODS)
def test_every_method_says_what_modelspec_requires(method: str, twins: Callable[[str], Path], tmp_path: Path) -> None:
    family, adapter, recipe = formats.made(twins("sd"), method)
    endings = {"embedding": "textual-inversion", "hypernetwork": "hypernetwork", "full": "delta", "selection": "delta"}
    for layout, weights, path in formats.written(
        [part.weights() for part in adapter.parts()], family, recipe, tmp_path
    ):
        if path.suffix != ".safetensors":
            continue
        header = read_header(path)[1]
        assert not [key for key in REQUIRED if not header.get(f"modelspec.{key}")]
        ending = "" if layout == "single-file" else f"/{endings.get(weights.kind, 'lora')}"
        assert header["modelspec.architecture"] == f"stable-diffusion-custom{ending}"
        assert header["modelspec.trigger_phrase"].startswith("<zib>")
        assert json.loads(header["finetune.lock"])["adapter"]["kind"] == recipe.adapter.kind


def test_fields_that_kohyas_tools_and_web_uis_read(twins: Callable[[str], Path], tmp_path: Path) -> None:
    family, adapter, recipe = formats.made(twins("sd"), "lora")
    (path,) = export(adapter.weights(), family, formats.asking(recipe, "kohya"), tmp_path)
    header = read_header(path)[1]
    for key in ("ss_v2", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"):
        assert header[key], key
    assert all(isinstance(value, str) for value in header.values())
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["activation text"] == "<zib> star" and card["sd version"] == "Other"
    assert {"description", "preferred weight", "negative text", "notes"} <= card.keys()


def test_a_kohya_file_of_flux_says_whose_names_it_has(twins: Callable[[str], Path]) -> None:
    """Forge sorts it under Flux by that."""
    family, _, recipe = formats.made(twins("flux"), "lora")
    assert describe("kohya", (), {}, family, recipe)["modelspec.implementation"].endswith("black-forest-labs/flux")
    assert describe("diffusers", (), {}, family, recipe)["modelspec.implementation"] == "diffusers"


def test_a_lock_tells_all_settings_and_no_folders(recipe: Callable[..., formats.Recipe]) -> None:
    concept = {"folder": "/home/somebody/pictures/rex", "prompt": "a photo of zib dog", "trigger": "zib"}
    told = json.loads(locked(recipe(data={"concepts": [concept], "resolution": 16})))
    assert "somebody" not in json.dumps(told)
    assert told["data"]["concepts"][0]["folder"] == "rex"
    assert told["train"]["optimizer"]["name"] == "adamw" and "threads" not in told["train"]


def test_a_cover_travels_in_the_header_and_changes_no_tensor(twins: Callable[[str], Path], tmp_path: Path) -> None:
    family, adapter, recipe = formats.made(twins("sd"), "lora")
    weights = adapter.weights()
    paths = export(weights, family, recipe, tmp_path)
    before = [read_tensors(path) for path in paths]
    picture = Image.new("RGB", (640, 480), (200, 40, 90))
    for path, tensors in zip(paths, before, strict=True):
        put_cover(path, picture)
        after = read_tensors(path)
        assert tensors.keys() == after.keys() and all(torch.equal(after[key], tensors[key]) for key in tensors)
        kind, _, content = read_header(path)[1]["modelspec.thumbnail"].partition(",")
        shown = Image.open(io.BytesIO(base64.b64decode(content)))
        assert kind == "data:image/jpeg;base64" and shown.size == (256, 192)
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
        verify(path, weights=weights).require()
        assert {"carries a picture", "carries the recipe that it was trained by"} <= set(inspect(path).notes)
    assert [path.name for path in tmp_path.glob("*.preview.png")] == ["zib.preview.png"]
