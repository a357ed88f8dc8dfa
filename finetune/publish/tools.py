"""The steps of a card, tool by tool, with the names of the files that are there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from finetune.export.loads import YES
from finetune.export.metadata import OWN, sampling
from finetune.export.read import Identity
from finetune.export.usage import imports, loading, pipeline, single_file
from finetune.families import families
from finetune.publish.markdown import code

NAMES = {"diffusers": "diffusers", "comfyui": "ComfyUI", "forge": "Forge", "a1111": "A1111", "kohya": "kohya's tools"}
"""Of ``finetune.export.loads``, as people write them."""

_COMFYUI = {
    "lora": ("models/loras/", "add a *Load LoRA* node between the checkpoint and the sampler"),
    "embedding": ("models/embeddings/", "write {} into the prompt", "embedding:{stem}"),
    "hypernetwork": ("models/hypernetworks/", "add a *HypernetworkLoader* node behind the checkpoint"),
}
_WEBUI = {
    "lora": ("models/Lora/", "write {} into the prompt; the number is the strength", "<lora:{stem}:1>"),
    "embedding": ("embeddings/", "write {} into the prompt", "{stem}"),
    "hypernetwork": ("models/hypernetworks/", "write {} into the prompt", "<hypernet:{stem}:1>"),
}
_KOHYA = {
    "lora": ("the working folder", "give the image generator {}", "--network_weights {name}"),
    "embedding": ("the working folder", "give the image generator {}", "--textual_inversion_embeddings {name}"),
}
"""Kind -> where its file goes, what is done then, and what is written there, if anything."""
_STEPS: Mapping[str, Mapping[str, Sequence[str]]]
_STEPS = {"comfyui": _COMFYUI, "forge": _WEBUI, "a1111": _WEBUI, "kohya": _KOHYA}
_LIKE = {"lycoris": "lora", "pivotal": "lora"}  # where the same is done with a file of another kind
_TITLES = {("comfyui",): "ComfyUI", ("a1111", "forge"): "A1111 and Forge", ("kohya",): "kohya's tools"}


def diffusers(repository: str, base: str | None, used: Sequence[Identity], prompt: str) -> str:
    """A script that draws with what lies in a repository."""
    lines = [_base(repository, base, used), *(loading(piece, repository) for piece in used if not piece.whole)]
    if settings := sampling(used[0].metadata):  # what it was trained for, and the base was not
        lines.append(f"pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, **{settings!r})")
    return "\n".join(
        [
            imports("\n".join(lines)),
            *lines,
            f"pipeline({prompt or 'what you would like to see'!r}).images[0].save('picture.png')",
        ]
    )


def _base(repository: str, base: str | None, used: Sequence[Identity]) -> str:
    """The line that makes the pipeline; of a model that lies there both ways, out of its folder."""
    whole = sorted((piece for piece in used if piece.whole), key=lambda piece: piece.path.is_file())
    if not whole or whole[0].path.is_dir():
        return pipeline(repository if whole else base or "path/to/the/base/model")
    kind = families()[whole[0].metadata[f"{OWN}family"]].pipelines[0]
    return single_file(f"hf_hub_download({repository!r}, {whole[0].path.name!r})", kind, base or "")


def sections(loads: Sequence[tuple[Identity, Mapping[str, str]]]) -> Iterator[str]:
    """The steps for each other tool that takes one of the files.

    Args:
        loads: of each file: tool -> "yes" or what goes wrong, as ``finetune.export.inspect`` says.
    """
    for names, title in _TITLES.items():
        steps: dict[str, str] = {}
        for piece, said in loads:
            like = _LIKE.get(piece.kind, piece.kind)
            if like in _STEPS[names[0]] and any(said.get(tool, "").startswith(YES) for tool in names):
                steps.setdefault(like, _sentence(piece, *_STEPS[names[0]][like]))
        if steps:
            yield f"### {title}\n\n" + "\n".join(f"- {step}" for step in steps.values())


def _sentence(piece: Identity, folder: str, then: str, written: str = "") -> str:
    name, stem = piece.path.name, piece.path.stem
    place = code(folder) if folder.endswith("/") else folder
    return f"Put {code(name)} into {place} and {then.format(code(written.format(name=name, stem=stem)))}."
