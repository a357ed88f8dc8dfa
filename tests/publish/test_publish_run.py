"""What of a run goes up, and what never does."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from safetensors.torch import load_file, save_file

from finetune.config import read_recipe
from finetune.errors import GuardError, UserError
from finetune.export.read import read_header
from finetune.publish.push import prepare, push, write

WRITTEN = {
    "README.md",
    "images/0.png",
    "images/1.png",
    "pytorch_lora_weights.safetensors",
    "recipe.lock.yaml",
    "zib.json",
    "zib.safetensors",
}


class Hub:
    """What ``HfApi`` is asked, in order; ``wrong`` is raised at the first question."""

    def __init__(self, wrong: Exception | None = None, private: bool = True) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.uploaded: dict[str, bytes] = {}
        self._wrong, self._private = wrong, private

    def create_repo(self, name: str, **options: Any) -> str:
        if self._wrong:
            raise self._wrong
        self.asked.append(("create_repo", {"name": name, **options}))
        return f"https://huggingface.co/{name}"

    def model_info(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(private=self._private)

    def create_branch(self, name: str, **options: Any) -> None:
        self.asked.append(("create_branch", {"name": name, **options}))

    def upload_folder(self, *, folder_path: Any, **options: Any) -> None:
        self.asked.append(("upload_folder", options))
        files = (path for path in Path(folder_path).glob("**/*") if path.is_file())  # as the library finds them
        self.uploaded = {path.relative_to(folder_path).as_posix(): path.read_bytes() for path in files}


def test_a_dry_run_writes_what_would_be_uploaded(ended, tmp_path):
    upload = prepare(ended, "me/zib")
    assert set(write(upload, tmp_path / "out")) == WRITTEN
    there = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert there == WRITTEN, "no cache, no checkpoint, no training picture, no log"
    for name in ("zib.safetensors", "zib.json"):
        assert (tmp_path / "out" / name).read_bytes() == (ended / "adapters" / name).read_bytes()
    last = ended / "samples" / "step-000002" / "0-0.png"
    assert (tmp_path / "out" / "images" / "0.png").read_bytes() == last.read_bytes()
    assert not (tmp_path / "out" / "zib.safetensors").is_symlink()
    with pytest.raises(UserError, match="not overwritten"):
        write(upload, tmp_path / "out")


def test_the_recipe_says_nothing_of_the_machine(ended, tmp_path):
    write(prepare(ended, "me/zib"), tmp_path / "out")
    text = (tmp_path / "out" / "recipe.lock.yaml").read_text(encoding="utf-8")
    assert str(ended.parent) not in text and "tmp" not in text
    recipe = read_recipe(tmp_path / "out" / "recipe.lock.yaml")
    assert (recipe.data.concepts[0].folder, recipe.output, recipe.train.steps) == ("pictures", "zib", 2)
    assert any("header says that its base lies in" in note for note in prepare(ended, "me/zib").notes)


def test_one_file_goes_alone(ended):
    upload = prepare(ended / "adapters" / "zib.safetensors", "me/zib")
    assert {*upload.files, *upload.texts} == WRITTEN - {"pytorch_lora_weights.safetensors"}


def test_a_file_without_a_run(ended, tmp_path):
    shutil.copy(ended / "adapters" / "zib.safetensors", tmp_path / "star.safetensors")
    upload = prepare(tmp_path / "star.safetensors", "me/star", pictures=[ended / "samples" / "step-000001" / "0-0.png"])
    assert {*upload.files, *upload.texts} == {"README.md", "star.safetensors", "images/0.png"}


def test_it_is_one_commit(ended):
    hub = Hub()
    address = push(prepare(ended, "me/zib"), private=True, revision="v2", message="First", api=hub)
    assert address == "https://huggingface.co/me/zib"
    assert hub.asked == [
        ("create_repo", {"name": "me/zib", "private": True, "exist_ok": True}),
        ("create_branch", {"name": "me/zib", "branch": "v2", "exist_ok": True}),
        ("upload_folder", {"repo_id": "me/zib", "revision": "v2", "commit_message": "First"}),
    ]
    assert hub.uploaded.keys() == WRITTEN
    assert hub.uploaded["zib.safetensors"] == (ended / "adapters" / "zib.safetensors").read_bytes()


def test_a_public_repository_is_not_taken_for_a_private_one(ended):
    hub = Hub(private=False)
    with pytest.raises(UserError, match=r"me/zib: is there already and public; nothing was uploaded"):
        push(prepare(ended, "me/zib"), private=True, api=hub)
    assert not hub.uploaded
    push(prepare(ended, "me/zib"), api=hub)
    assert hub.asked[-1][1]["commit_message"] == "Upload pytorch_lora_weights.safetensors, zib.safetensors"


def refused(status: int) -> HfHubHTTPError:
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    OSError.__init__(error, f"{status} Client Error")
    error.response = SimpleNamespace(status_code=status)  # type: ignore[assignment]
    return error


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (refused(401), "not logged in; run `hf auth login`"),
        (LocalTokenNotFoundError("no token"), "not logged in"),
        (refused(403), "may not write there"),
        (refused(500), "refused with status 500"),
        (HTTPError("connection timed out"), r"cannot be reached .*connection timed out"),
        (ConnectionError("name resolution failed"), r"cannot be reached .*name resolution failed.*--dry-run"),
    ],
)
def test_what_goes_wrong_is_said(wrong, words, ended):
    with pytest.raises(UserError, match=words):
        push(prepare(ended, "me/zib"), api=Hub(wrong))


def test_a_number_that_is_none_is_refused(run):
    path = run() / "adapters" / "zib.safetensors"
    tensors, header = load_file(path), read_header(path)[1]
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[key][0, 0] = torch.nan
    save_file(tensors, path, header)
    with pytest.raises(GuardError, match=rf"zib\.safetensors: {key} holds 1 of .* NaN"):
        prepare(path.parents[1], "me/zib")


def test_a_file_that_fails_a_check_is_refused(run):
    path = run() / "adapters" / "zib.safetensors"
    tensors, header = load_file(path), read_header(path)[1]
    up = {key: torch.zeros_like(one) if "lora_up" in key else one for key, one in tensors.items()}
    save_file(up, path, header)
    with pytest.raises(GuardError, match="learned"):
        prepare(path, "me/zib")


def test_without_its_base_it_is_not_verified_and_that_is_said(ended, tmp_path):
    tensors, header = load_file(ended / "adapters" / "zib.safetensors"), None
    header = {**read_header(ended / "adapters" / "zib.safetensors")[1], "finetune.base": "nobody/nothing-of-that-name"}
    save_file(tensors, tmp_path / "zib.safetensors", header)
    upload = prepare(tmp_path / "zib.safetensors", "me/zib")
    assert upload.notes == (
        "zib.safetensors: not verified, its base nobody/nothing-of-that-name is not on this machine (--base)",
    )
    assert "base_model: nobody/nothing-of-that-name" in upload.texts["README.md"]


def test_a_run_that_has_not_ended_is_refused(run):
    folder = run()
    lock = folder / "recipe.lock.yaml"
    lock.write_text(lock.read_text(encoding="utf-8").replace("steps: 2", "steps: 9"), encoding="utf-8")
    with pytest.raises(UserError, match=r"is of 2 steps, and the run's recipe has 9; let it end: finetune train"):
        prepare(folder, "me/zib")
    shutil.rmtree(folder / "adapters")
    with pytest.raises(UserError, match=r"zib: has no finished export in adapters/"):
        prepare(folder, "me/zib")


def test_what_cannot_go_up_is_said(ended, tmp_path):
    with pytest.raises(UserError, match="expected owner/name"):
        prepare(ended, "zib")
    with pytest.raises(UserError, match="no name of a repository"):
        prepare(ended, "me/zib star")
    with pytest.raises(UserError, match="holds no adapter and is no run"):
        prepare(tmp_path, "me/zib")
    with pytest.raises(UserError, match="was trained with"):
        prepare(ended, "me/zib", pictures=[ended.parent / "pictures" / "0.png"])
    with pytest.raises(UserError, match="is no picture"):
        prepare(ended, "me/zib", pictures=[ended / "metrics.jsonl"])
