"""Packages import only what stands below them. The order is the architecture; this test keeps it true."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BOTTOM = {"errors", "files", "randomness"}  # standard library, and torch where they write tensors or draw numbers
BORDERS = {"batch", "objective", "family", "adapter"}  # what families, methods, data and the loop agree on

ALLOWED = {
    "errors": set(),
    "randomness": set(),
    "files": set(),
    "batch": set(),
    "blocks": set(),
    "objective": {"randomness"},
    "originals": set(),
    "family": {"batch", "config", "objective", "objectives", "originals", "errors"},
    "adapter": set(),
    "objectives": {"objective", "config", "errors", "randomness"},
    "denoise": {"adapter", "batch", "family", "objective", "config"},
    "config": {"errors", "files"},
    "tinyworld": BOTTOM,
    "launcher": {"errors"},
    "launch": {"config", "errors"},
    "engines": {"blocks", "config", *BOTTOM},
    "waiting": BOTTOM,
    "distributed": {"engines", "config", "launcher", "waiting", *BOTTOM},
    "families": {"batch", "blocks", "family", "objective", "objectives", "originals", "config", "tinyworld", *BOTTOM},
    "hypernet": BOTTOM,
    "adapters": {"adapter", "batch", "family", "hypernet", "config", *BOTTOM},
    "aesthetic": {"adapter", "family", *BOTTOM},
    "sampling": {"family", "config", "distributed", *BOTTOM},
    "data": {"batch", "family", "config", "sampling", "tinyworld", *BOTTOM},
    "train": {*BORDERS, "config", "engines", "distributed", "sampling", *BOTTOM},
    "export": {*BORDERS, "aesthetic", "hypernet", "config", "families", "originals", "sampling", *BOTTOM},
    "evaluation": {"config", "tinyworld", *BOTTOM},
    # what puts the parts together
    "plan": {
        *BORDERS,
        "aesthetic",
        "blocks",
        "engines",
        "config",
        "data",
        "families",
        "adapters",
        "train",
        "export",
        *BOTTOM,
    },
    "finish": {*BORDERS, "config", "data", "families", "train", "export", "evaluation", "sampling", "distributed"},
    "formats": {"adapter", "family", "families", "adapters", "config", "export", "errors", "randomness"},
    "preview": {"adapter", "family", "export", "files", "sampling", "train"},
    "demo": {"config", "export", "family", "sampling", *BOTTOM},
    "publish": {"config", "export", "families", "train", *BOTTOM},
    "judge_run": {"family", "config", "families", "train", "export", "evaluation", "sampling", "errors"},
}
COMMANDS = {
    "cli",
    "cli_adapters",
    "cli_caption",
    "cli_data",
    "cli_masks",
    "cli_tinyworld",
    "__main__",
}  # may name everything
TORCHLESS = {"errors", "config", *COMMANDS, "__init__"}
FILES = sorted((ROOT / "finetune").rglob("*.py"))


def package_of(file: Path) -> str:
    return file.relative_to(ROOT / "finetune").parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[int, str, str]]:
    """Line, top package and what is below it: ``(3, "finetune", "config")``."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports name the whole path"
            parts = (node.module or "").split(".")
            below = parts[1:2] or [alias.name for alias in node.names]
            yield from ((node.lineno, parts[0], name) for name in below)
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (node.lineno, *[*alias.name.split("."), ""][:2])


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file: Path) -> None:
    package = package_of(file)
    for line, top, name in imports(file):
        place = f"{file.relative_to(ROOT)}:{line}"
        assert top not in ("recipes", "data_tools") or package in COMMANDS, f"{place}: only commands may name {top}"
        if top == "finetune" and name not in ("", "__version__") and package not in {*COMMANDS, "__init__"}:
            allowed = {package, *ALLOWED.get(package, ())}
            assert package in ALLOWED, f"{place}: the package {package} has no place in the order yet"
            assert name in allowed, f"{place}: {package} must not import {name}"


def test_the_order_has_no_circles() -> None:
    standing = dict(ALLOWED)
    while standing:
        free = [name for name, below in standing.items() if not (below & standing.keys()) - {name}]
        assert free, f"these lean on each other: {sorted(standing)}"
        for name in free:
            del standing[name]


def test_families_and_adapters_meet_in_data_alone() -> None:
    assert not ALLOWED["families"] & {"adapters", "train", "data", "export"}
    assert not ALLOWED["adapters"] & {"families", "train", "data", "export"}
    assert not ALLOWED["data"] & {"families", "adapters", "train"}
    assert not ALLOWED["config"] & {"families", "adapters", "train", "data"}


@pytest.mark.parametrize("file", [file for file in FILES if package_of(file) in TORCHLESS], ids=lambda file: file.name)
def test_what_starts_fast_names_no_model_library(file: Path) -> None:
    heavy = {"torch", "diffusers", "transformers", "accelerate", "peft"}
    assert not [top for _, top, _ in imports(file) if top in heavy]


@pytest.mark.parametrize(
    "code",
    [
        "import finetune, finetune.cli, finetune.config, finetune.config.command, finetune.data",
        "import finetune.tinyworld, finetune.evaluation, finetune.randomness, finetune.files",
        "import sys, finetune.cli as c; sys.argv = ['finetune', '--help']\ntry: c.main()\nexcept SystemExit: pass",
    ],
)
def test_nothing_loads_torch_before_it_is_needed(code: str) -> None:
    check = "import sys; loaded = {'torch', 'diffusers', 'transformers'} & set(sys.modules); assert not loaded, loaded"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
