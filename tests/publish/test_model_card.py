"""The card says what the hub reads and what a person has to do, whatever words a user has chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from exported_methods import METHODS, write
from PIL import Image
from safetensors.torch import save_file

from finetune.config.schema import SamplerConfig
from finetune.export.sample import sample
from finetune.export.tools.convert import convert
from finetune.export.tools.merge_into import merge_into
from finetune.export.tools.method import Method
from finetune.publish.markdown import code, fenced
from finetune.publish.private import without_place
from finetune.publish.push import prepare
from finetune.randomness import generator


def parts(text: str) -> tuple[dict[str, Any], str]:
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def card(path: Path, **options: Any) -> tuple[dict[str, Any], str]:
    return parts(prepare(path, "me/zib", **options).texts["README.md"])


def test_front_matter_of_a_run(ended):
    front, body = card(ended, license="openrail++")
    assert front == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": "openrail++",
        "instance_prompt": "a photo of zib star",
        "tags": ["text-to-image", "diffusers", "stable-diffusion", "lora", "template:sd-lora", "dreambooth"],
        "widget": [{"text": "a photo of zib star", "output": {"url": f"images/{n}.png"}} for n in range(2)],
    }
    for words in (
        "`zib star`, as in `a photo of zib star`.",
        "pipeline.load_lora_weights('me/zib', weight_name='pytorch_lora_weights.safetensors')",
        "Put `zib.safetensors` into `models/loras/` and add a *Load LoRA* node",
        "Put `zib.safetensors` into `models/Lora/` and write `<lora:zib:1>` into the prompt",
        "`--network_weights zib.safetensors`",
        "| rank | `2` |",
        "| learning rate | `0.01` |",
        "diffusers 0.",
    ):
        assert words in body
    assert "partly: it drops attention layers without a word" in body, "of the file that is not for ComfyUI"


@pytest.mark.parametrize(
    "method", [pytest.param(one, marks=[pytest.mark.slow] if one in ("dora", "loha", "oft") else []) for one in METHODS]
)
def test_the_script_draws_what_sample_draws(method, tiny_sd, monkeypatch, tmp_path):
    """As a reader copies it, of every method, with the repository in a folder and the model's noise."""
    run = write(method, tiny_sd, tmp_path)
    _, body = card(run)
    script = body.partition("```python\n")[2].partition("\n```")[0]
    assert "me/zib" in script
    folder = run / "adapters" / ("model" if method == "full" else "")
    script = script.replace("'path/to/the/base/model'", repr(str(tiny_sd))).replace("'me/zib'", repr(str(folder)))
    script = script.replace("what you would like to see", "a photo of <zib> star")  # a whole model says no prompt
    few = "num_inference_steps=2, guidance_scale=3.0, generator=generator(0, 'sample', 0, 0)"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda place, name: str(Path(place) / name))
    monkeypatch.chdir(tmp_path)
    exec(compile(script.replace(").images", f", {few}).images"), "card", "exec"), {"generator": generator})
    wanted = sample(run, ["a photo of <zib> star"], sampler=SamplerConfig(steps=2, guidance=3.0))[0]
    assert np.array_equal(np.asarray(Image.open("picture.png").convert("RGB")), np.asarray(wanted))


@pytest.mark.parametrize(
    "prompt", ['a "photo": of #1 [zib] - {star}', "zib: 'yes'\n---\nlicense: evil", "`zib` ``` | star"]
)
def test_words_of_a_user_are_words(prompt, ended, run):
    folder = run()
    lock = folder / "recipe.lock.yaml"
    recipe = yaml.safe_load(lock.read_text(encoding="utf-8"))
    recipe["data"]["concepts"][0]["prompt"] = prompt
    lock.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    text = prepare(folder, "me/zib").texts["README.md"]
    front = yaml.safe_load(text[4 : text.index("\n---\n\n# ")])
    assert front["instance_prompt"] == prompt and front["widget"][0]["text"] == prompt
    assert "license" not in front
    assert text.count("\n### ComfyUI\n") == 1 and text.count("\n## Use it\n") == 1


def test_code_holds_any_text():
    assert code("a `b` c") == "``a `b` c``"
    assert code("`") == "`` ` ``"
    assert code("one\ntwo | three") == r"`one two \| three`"
    assert fenced("```\nx", "python") == "````python\n```\nx\n````"


def test_places_of_a_machine_are_left_out():
    assert without_place("/home/alice/pictures/rex") == "rex"
    assert without_place("~/rex") == "rex"
    assert without_place("https://alice:secret@host/rex.tar?signature=1") == "https://host/rex.tar"
    assert [without_place(text) for text in ("owner/name", "a photo of zib", "s3://bucket/rex")] == [
        "owner/name",
        "a photo of zib",
        "s3://bucket/rex",
    ]


def test_other_trainers_files(tmp_path):
    """A kohya file of Stable Diffusion 1 that says nothing of itself."""
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    factors = {f"{stem}.lora_down.weight": torch.ones(2, 768), f"{stem}.lora_up.weight": torch.ones(1280, 2)}
    save_file(factors, tmp_path / "foreign.safetensors", {"ss_network_module": "networks.lora"})
    upload = prepare(tmp_path / "foreign.safetensors", "me/zib")
    front, body = parts(upload.texts["README.md"])
    assert "base_model" not in front and "instance_prompt" not in front
    assert "weight_name='foreign.safetensors'" in body and "`<lora:foreign:1>`" in body
    assert "made with kohya's tools (networks.lora)." in body
    assert upload.notes == ("foreign.safetensors: not verified, it does not say which base model it is for (--base)",)


def test_a_whole_model_lies_at_the_top(ended, tiny_sd, tmp_path):
    lora = ended / "adapters" / "zib.safetensors"
    model = merge_into([lora], str(tiny_sd), tmp_path / "model", Method("concat", (1.0,))).path
    (model / "unet" / "optimizer.pt").write_bytes(b"no weights")
    upload = prepare(model, "me/zib")
    assert not [name for name in upload.files if name.endswith(".pt")]
    assert "model_index.json" in upload.files and "unet/diffusion_pytorch_model.safetensors" in upload.files
    front, body = parts(upload.texts["README.md"])
    assert "lora" not in front["tags"]
    assert "DiffusionPipeline.from_pretrained('me/zib')" in body and "load_lora" not in body


def test_words_are_loaded_by_the_loader_of_words(tmp_path):
    save_file({"<zib>": torch.ones(1, 32)}, tmp_path / "learned_embeds.safetensors")
    convert(tmp_path / "learned_embeds.safetensors", tmp_path / "zib.pt", "a1111")
    for name, folder in (("zib.pt", "`models/embeddings/`"), ("learned_embeds.safetensors", "")):
        upload = prepare(tmp_path / name, "me/zib")
        front, body = parts(upload.texts["README.md"])
        assert "textual_inversion" in front["tags"]
        assert f"pipeline.load_textual_inversion('me/zib', weight_name='{name}')" in body
        assert folder in body
