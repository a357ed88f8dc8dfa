"""Files of twins of FLUX.1 and SD 3, from what was trained to what is read."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file
from test_lora_family_files import trained

from finetune.errors import UserError
from finetune.export import export, identify, layers, read, verify
from finetune.export.inspect import inspect
from finetune.export.kinds import kind
from finetune.families import families

LORA = {"kind": "lora", "rank": 2, "alpha": 1.0, "targets": "wide"}
LOHA = {"kind": "loha", "rank": 2, "alpha": 3.0, "targets": "wide"}
LOKR = {"kind": "lokr", "rank": 2, "alpha": 3.0, "targets": "wide"}
DORA = {**LORA, "use_dora": True}


@pytest.fixture(scope="module", params=["flux", "sd3"])
def twin(request, tmp_path_factory):
    tiny = sys.modules[families()[request.param].__module__].tiny
    return tiny(tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture
def written(twin, recipe, tmp_path):
    def write(settings, *formats):
        family, adapter = trained(twin, settings)
        chosen = recipe(model={"path": str(twin)}, adapter=settings, export={"formats": list(formats)})
        return family, adapter, export(adapter.weights(), family, chosen, tmp_path)

    return write


def test_lora_is_exact_in_both_layouts(written):
    family, adapter, paths = written(LORA, "diffusers", "kohya")
    before = {layer.name: layer for layer in layers(adapter.weights())}
    for path in paths:
        checks = {check.name for check in verify(path, weights=adapter.weights()).require().checks}
        after = {layer.name: layer for layer in layers(read(path, family.export_names))}
        assert before.keys() <= after.keys()
        for name, layer in after.items():
            change = before[name].delta() if name in before else torch.zeros_like(layer.delta())
            assert torch.equal(layer.delta(), change), name
    assert {"comfyui", "kohya"} <= checks and not {"a1111", "diffusers: loads"} & checks
    assert any(key.endswith(("img_attn_qkv.alpha", "x_block_attn_qkv.alpha")) for key in load_file(path))
    assert inspect(path).family == {"flux": "FLUX.1", "sd3": "Stable Diffusion 3 or 3.5"}[family.name]


@pytest.mark.parametrize("settings", [LOHA, LOKR, DORA], ids=["loha", "lokr", "dora"])
def test_other_methods_answer_as_in_memory(settings, written):
    """The file's own changes, added to the weights of a fresh pipeline."""
    _, adapter, (path,) = written(settings, "kohya")
    checks = {check.name for check in verify(path, weights=adapter.weights()).require().checks}
    assert {"comfyui", "merged: loads, output", "merged: output at half"} <= checks and "a1111" not in checks


def test_a_file_of_which_diffusers_takes_nothing_is_refused(written):
    family, _, (path,) = written(LORA, "kohya")
    if family.name == "sd3":
        with pytest.raises(UserError, match="diffusers knows none of its layers in StableDiffusion3Pipeline"):
            kind("lora").apply(family.pipeline(), identify(path), 1.0)
