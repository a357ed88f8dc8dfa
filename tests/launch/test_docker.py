"""launch/docker/Dockerfile, which cannot be built here: what it copies is there, is enough, and fits the pins."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from started import ROOT, surroundings

TEXT = (ROOT / "launch" / "docker" / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = (ROOT / "constraints.txt").read_text().splitlines()


def instructions() -> list[tuple[str, str]]:
    lines = re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def copied() -> list[tuple[str, str]]:
    """What is copied, and where to below the toolkit's folder."""
    found = []
    for word, rest in instructions():
        if word == "COPY":
            *sources, target = rest.split()
            found += [
                (source, f"{target}{Path(source).name}" if target.endswith("/") else target) for source in sources
            ]
    return found


def sent(path: str) -> bool:
    """Whether .dockerignore lets a path into the build."""
    let = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if line and not line.startswith("#") and any(fnmatch(part, pattern) for part in Path(path).parts):
            let = line.startswith("!")
    return let


def test_what_is_copied_is_there_and_is_sent() -> None:
    for source, _ in copied():
        assert (ROOT / source).exists() and sent(source), source
    for path in ("tests/conftest.py", ".git/config", ".venv/bin/python", "runs/x", "finetune/__pycache__/cli.pyc"):
        assert not sent(path), path


def test_python_torch_and_the_entry_fit_what_the_project_says() -> None:
    versions = set(re.findall(r"python(3\.\d+)", TEXT))
    (version,) = versions
    assert version in SpecifierSet(PROJECT["project"]["requires-python"])
    (asked,) = re.findall(r"\$\(grep '([^']+)' constraints.txt\)", TEXT)
    (torch,) = [Requirement(line) for line in PINS if re.match(asked, line)]
    assert torch.name == "torch" and "+" not in str(torch.specifier), "a build that is not chosen by the index"
    assert "install -c constraints.txt" in TEXT
    said = dict(instructions())  # the last of each
    assert said["USER"] not in ("root", "0")
    assert said["ENTRYPOINT"] == str([next(iter(PROJECT["project"]["scripts"]))]).replace("'", '"')
    base = re.search(r"^ARG BASE=(\S+)$", TEXT, re.MULTILINE)
    assert base and not re.search(r"[.:]", base[1].split("/")[0]), "another host than the engine's own"


@pytest.mark.slow
def test_what_is_copied_is_enough_to_read_a_recipe_and_to_find_pages_and_profiles(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for source, target in copied():
        if (ROOT / source).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / source, tree / target, dirs_exist_ok=True, ignore=ignored)
        else:
            (tree / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, tree / target)
    for package in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]:
        assert (tree / package.removesuffix("*")).is_dir(), package
    recipe = tree / "recipes" / "configs" / "lora-tiny.yaml"
    command = [sys.executable, "-P", "-m", "finetune", "train", str(recipe), "--launch", "zero4"]
    environment = {**surroundings(), "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "did you mean 'zero" in done.stderr, "the profiles that lie beside the pages"
