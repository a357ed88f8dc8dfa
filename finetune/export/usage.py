"""What to write in Python to draw with a file."""

from __future__ import annotations

import re

from finetune.export.embedding import is_several
from finetune.export.metadata import OWN
from finetune.export.read import Identity, read_header
from finetune.families import EMBEDDED

_OWN_LOADERS = {
    "full": "load_delta",
    "aesthetic": "load_aesthetic",
    "hypernetwork": "load_hypernetwork",
    "lycoris": "load_lycoris",
}
_ENCODERS = {"clip_l": "", "clip_g": "_2"}  # of SDXL: key in a word's file -> how diffusers numbers the encoder


def loading(found: Identity, repository: str | None = None) -> str:
    """The lines that put a file into a diffusers ``pipeline``.

    Args:
        found: an adapter file, not a whole model.
        repository: of a hub, where the file lies under its own name; its path is taken where it is not given.
    """
    name, path = found.path.name, repr(str(found.path))
    fetched = f"hf_hub_download({repository!r}, {name!r})" if repository else path
    if found.kind == "embedding" and found.path.suffix == ".safetensors":
        keys = read_header(found.path)[0]
        if is_several(keys):
            return _several(keys, found, fetched)
    if found.kind in _OWN_LOADERS or found.layout == "difference":
        return f"finetune.{_OWN_LOADERS.get(found.kind, 'load_lycoris')}(pipeline, {fetched})"
    load = "load_textual_inversion" if found.kind == "embedding" else "load_lora_weights"
    return f"pipeline.{load}({repository!r}, weight_name={name!r})" if repository else f"pipeline.{load}({path})"


def pipeline(model: str) -> str:
    """The line that makes the diffusers ``pipeline`` of a folder, a hub name or a model that is shipped."""
    if model in EMBEDDED:
        return f"pipeline = tinyworld.pipeline({model!r})"
    return f"pipeline = DiffusionPipeline.from_pretrained({model!r})"


def single_file(path: str, kind: str, like: str = "") -> str:
    """The same of a single-file checkpoint.

    Args:
        path: an expression of Python.
        kind: diffusers' class.
        like: folder or hub name of a model whose settings it has; diffusers finds them where it is not given.
    """
    return f"pipeline = {kind}.from_single_file({path}{f', config={like!r}' if like else ''})"


def imports(lines: str) -> str:
    """What ``pipeline`` and ``loading`` need: import statements, a line each, with its end."""
    kind = re.search(r"= (\w+Pipeline)\.", lines)
    classes = f"from diffusers import {kind[1]}\n" if kind else ""
    wanted = {
        "= tinyworld.": "from finetune import tinyworld",
        "finetune.": "import finetune",
        "hf_hub_download(": "from huggingface_hub import hf_hub_download",
        "load_file(": "from safetensors.torch import load_file",
    }
    return classes + "".join(f"{statement}\n" for mark, statement in wanted.items() if mark in lines)


def _several(keys: list[str], found: Identity, fetched: str) -> str:
    """Of a word that several text encoders read, which diffusers loads one by one."""
    if not {*keys} <= _ENCODERS.keys():
        return "# diffusers has no loader for words of these text encoders: draw with `finetune sample`"
    token = found.metadata.get(f"{OWN}token") or found.path.stem
    lines = [
        f"pipeline.load_textual_inversion(rows[{key!r}], token={token!r}, "
        f"text_encoder=pipeline.text_encoder{suffix}, tokenizer=pipeline.tokenizer{suffix})"
        for key, suffix in _ENCODERS.items()
        if key in keys
    ]
    return "\n".join([f"rows = load_file({fetched})", *lines])
