"""What is written for the tools that a recipe names."""

from __future__ import annotations

import pytest

from finetune.config.schema import ModelConfig
from finetune.data.preparation import check_fit
from finetune.errors import UserError
from finetune.export.kinds import embedding, full, hypernetwork, lora, lycoris, pivotal
from finetune.families import flux, load_family, qwen_image, sd3

WORDS = {"kind": "embedding", "tokens": [{"token": "<zib>"}]}


def names(tiny_sd):
    return load_family(ModelConfig(path=str(tiny_sd))).export_names


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        (["comfyui"], ["kohya"]),
        (["a1111", "forge", "kohya", "invokeai", "stable-diffusion.cpp"], ["kohya"]),
        (["diffusers"], ["diffusers"]),
        (["comfyui", "diffusers"], ["diffusers", "kohya"]),
    ],
)
def test_lora(recipe, tiny_sd, tools, expected):
    assert list(lora.file_names(recipe(export={"for": tools}), names(tiny_sd))) == expected


def test_dora_is_for_uis_whole_differences(recipe, tiny_sd):
    dora = recipe(adapter={"kind": "lora", "use_dora": True}, export={"for": ["comfyui", "diffusers"]})
    assert list(lora.file_names(dora, names(tiny_sd))) == ["diffusers", "difference"]


def test_other_methods(recipe, tiny_sd):
    for kind in ("loha", "lokr"):
        found = recipe(adapter={"kind": kind}, export={"for": ["comfyui"]})
        assert list(lycoris.file_names(found, kind, names(tiny_sd))) == ["kohya"]
    uis = {"for": ["a1111", "comfyui"]}
    assert list(hypernetwork.file_names(recipe(adapter={"kind": "hypernetwork"}, export=uis))) == ["a1111"]
    assert embedding.file_names(recipe(adapter=WORDS, export=uis), names(tiny_sd)) == ["zib.safetensors", "zib.pt"]
    kv = {"kind": "full", "select": "cross-kv"}
    assert list(full.file_names(recipe(adapter=kv, export={"for": ["diffusers"]}))) == ["delta"]
    assert list(full.file_names(recipe(adapter=kv, export={"for": ["kohya"]}))) == ["model"]


def test_a_pair_is_two_files_for_each_tool(recipe, tiny_sd):
    both = recipe(
        recipe="pivotal",
        adapter={"kind": "pivotal", "embedding": WORDS, "weights": {"kind": "lora"}},
        export={"for": ["comfyui"]},
    )
    assert list(lora.file_names(both, names(tiny_sd))) == ["kohya"]
    assert embedding.file_names(both, names(tiny_sd)) == ["zib-word.safetensors", "zib-word.pt"]
    assert not pivotal.file_names(both, names(tiny_sd))


@pytest.mark.parametrize(
    ("module", "tool", "said"),
    [
        (flux, "a1111", "export.for: a1111 cannot read files of flux models; diffusers reads those that there are"),
        (qwen_image, "invokeai", "invokeai reads layout 'kohya', which there is not of qwen-image models; diffusers"),
    ],
)
def test_a_tool_that_has_no_such_model_is_refused_before_anything_is_read(recipe, tmp_path, module, tool, said):
    folder = module.tiny(tmp_path / "model")
    with pytest.raises(UserError, match=said):
        check_fit(
            recipe(model={"path": str(folder)}, export={"for": [tool]}), load_family(ModelConfig(path=str(folder)))
        )


def test_sd3_needs_two_files(recipe, tmp_path):
    family = load_family(ModelConfig(path=str(sd3.tiny(tmp_path / "model"))))
    both = recipe(export={"for": ["comfyui", "diffusers"]})
    check_fit(both, family)
    assert list(lora.file_names(both, family.export_names)) == ["diffusers", "kohya"]
