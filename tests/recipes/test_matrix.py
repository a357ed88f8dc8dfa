"""Every method on every family: trained, interrupted, continued to the same bytes, exported and verified."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from finetune.config import read_recipe
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import families, load_family
from finetune.families.support import support, table
from finetune.plan import plan
from recipes import dreambooth

WriteRecipe = Callable[..., Path]
ROOT = Path(__file__).parents[2]
WORDS = {"kind": "embedding", "tokens": [{"token": "<zib>", "initializer": "star", "vectors": 2}]}
LORA = {"kind": "lora", "rank": 2}
METHODS: Mapping[str, dict[str, Any]] = {
    "lora": {**LORA, "targets": "wide", "text_encoder": True},
    "lokr": {"kind": "lokr", "rank": 2},
    "loha": {"kind": "loha", "rank": 2},
    "oft": {"kind": "oft", "block_size": 4},
    "full": {"kind": "full", "text_encoder": True},
    "embedding": WORDS,
    "pivotal": {"kind": "pivotal", "embedding": WORDS, "weights": LORA},
    "custom diffusion": {
        "kind": "pivotal",
        "embedding": WORDS,
        "weights": {"kind": "full", "select": "cross-kv", "detach_start": True},
    },
    "hypernetwork": {"kind": "hypernetwork"},
}
HEAVY = ("flux2-dev", "flux2-klein", "lumina2", "sana")
"""Families of which only these cells are run every time, the others nightly: twins that are deep, and the latest."""
LIGHT = ("lora", "embedding")
CELLS = [
    pytest.param(name, method, marks=[pytest.mark.slow] if name in HEAVY and method not in LIGHT else [])
    for name, family in families().items()
    for method, why in support(family).items()
    if why is None and method in METHODS  # aesthetic embeddings take no steps: tests/recipes/test_aesthetic_page.py
]


def adapter(method: str, twin: Path) -> dict[str, Any]:
    """The section of a method; text encoders train wherever they can."""
    trains = bool(load_family(ModelConfig(path=str(twin))).sites.text_encoders)
    return {key: trains if key == "text_encoder" else value for key, value in METHODS[method].items()}


def data(folder: Path) -> dict[str, Any]:
    """The ``data`` section of a recipe with a new word in every caption."""
    captions = {"prompt": "a photo of <zib> star", "captions": "prompt", "trigger": "<zib>"}
    return {
        "resolution": 16,
        "concepts": [{"folder": str(folder / "subject"), "class_prompt": "a photo of a star", **captions}],
        "cache": {"folder": str(folder / "cache")},
    }


def exported(run: Path) -> dict[str, bytes]:
    """All tensor files below ``adapters``, without their headers, which name the run."""
    from finetune.export.read import read_tensors

    return {
        f"{file.relative_to(run / 'adapters')} {key}": tensor.numpy().tobytes()
        for file in sorted((run / "adapters").rglob("*.safetensors"))
        for key, tensor in read_tensors(file).items()
    }


@pytest.mark.parametrize(("name", "method"), CELLS)
def test_a_method_works_in_a_family(
    name: str, method: str, twins: Callable[[str], Path], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    path = write_recipe(
        model={"path": str(twins(name))},
        adapter=adapter(method, twins(name)),
        data=data(tmp_path),
        prior={"kind": "none"},
        train={"steps": 5, "batch_size": 2, "learning_rate": 1e-2, "threads": 1},
        checkpoint={"every": 3, "keep": 3},
    )
    foreseen = plan(read_recipe(path)).output.files
    dreambooth.main(read_recipe(path))  # ends with verification: every file loaded by its reader, with the same answer
    run = tmp_path / "run"
    whole = exported(run)
    assert whole
    assert [name for name in foreseen if name.startswith("adapters/") and not (run / name).exists()] == []
    shutil.rmtree(run / "checkpoints" / "step-000005")
    shutil.rmtree(run / "adapters")
    dreambooth.main(read_recipe(path))
    assert exported(run) == whole


@pytest.mark.parametrize(
    ("name", "method", "why"),
    [(name, method, why) for name, family in families().items() for method, why in support(family).items() if why],
)
def test_what_has_no_place_is_refused_with_the_reason(
    name: str, method: str, why: str, twins: Callable[[str], Path], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    family = load_family(ModelConfig(path=str(twins(name))))
    if method == "aesthetic":
        from finetune.aesthetic import require_space

        with pytest.raises(UserError) as caught:
            require_space(family)
    else:
        sections = {"adapter": METHODS[method], "prior": {"kind": "none"}, "model": {"path": str(twins(name))}}
        with pytest.raises(UserError) as caught:
            dreambooth.main(read_recipe(write_recipe(**sections, data=data(tmp_path))))
    assert why in str(caught.value)


@pytest.mark.parametrize("name", families())
def test_a_layout_that_a_family_has_not_is_refused(
    name: str, twins: Callable[[str], Path], write_recipe: WriteRecipe
) -> None:
    if load_family(ModelConfig(path=str(twins(name)))).export_names["denoiser"].kohya:
        return
    path = write_recipe(model={"path": str(twins(name))}, export={"formats": ["diffusers", "kohya"]})
    with pytest.raises(UserError, match=rf"export\.formats: {name} has no files of layout 'kohya'; it has diffusers"):
        dreambooth.main(read_recipe(path))


def test_the_page_of_models_says_what_the_code_says() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert table() in page, "stale: put what `finetune models` prints between the marks of docs/models.md"
