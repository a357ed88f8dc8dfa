"""A concept's pictures come from one place, and no key asks for what that place does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from written_recipes import GOOD, problems, written

from finetune.config import lock, read_recipe
from finetune.config.command import concept_names
from finetune.config.schema import ConceptConfig

WORDS = "prompt: a zib star, class_prompt: a star, trigger: zib"


@pytest.mark.parametrize(
    ("concept", "said"),
    [
        ("{%s}", "data.concepts.0.folder is missing: pictures come from a folder, from shards or from a dataset"),
        ("{folder: a, shards: b.tar, %s}", "data.concepts.0.shards is set beside folder"),
        ("{shards: b.tar, dataset: {path: a/b}, %s}", "data.concepts.0.dataset is set beside shards"),
        ("{shards: b.tar, captions: folder, %s}", "data.concepts.0.captions is 'folder', but the pictures don't come"),
        ("{dataset: {path: a/b}, captions: folder, %s}", "captions is 'folder', but the pictures don't come"),
        ("{dataset: {path: a/b}, captions: sidecar, %s}", "captions must be auto, metadata or prompt, not 'sidecar'"),
        ("{dataset: {path: a/b}, captions: filename, %s}", "captions must be auto, metadata or prompt, not 'filename'"),
        ("{dataset: {path: a/b}, masks: photos/masks, %s}", "masks must be alpha, not 'photos/masks'"),
        ("{dataset: {path: a/b, mask: m}, masks: alpha, %s}", "masks is set beside dataset.mask"),
        ("{dataset: {path: a/b, streaming: true}, %s}", "data.concepts.0.dataset.limit is missing"),
        ("{dataset: {name: small}, %s}", "data.concepts.0.dataset.path is missing: A hub name"),
        ("{dataset: a/b, %s}", "data.concepts.0.dataset must be a section of keys, not 'a/b'"),
        ("{dataset: {path: a/b, splt: train}, %s}", "data.concepts.0.dataset.splt is not a key; did you mean 'split'?"),
        ("{shards: [], %s}", "data.concepts.0.shards must be text or a list of texts, at least one, not an empty list"),
        ("{shards: 5, %s}", "data.concepts.0.shards must be text or a list of texts"),
    ],
)
def test_each_mistake_has_its_sentence(tmp_path: Path, concept: str, said: str) -> None:
    found = problems(written(tmp_path, GOOD), f"data.concepts=[{concept % WORDS}]")
    assert len(found) == 1 and said in found[0]


def test_class_images_are_kept_on_this_machine(tmp_path: Path) -> None:
    (found,) = problems(written(tmp_path, GOOD), "prior.folder=s3://bucket/stars")
    assert "prior.folder must be a folder of this machine" in found


def test_a_concept_of_shards_may_have_class_images_in_the_folder_of_the_cache(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, GOOD), [f"data.concepts=[{{shards: b.tar, {WORDS}}}]"])
    assert recipe.prior.kind == "images" and recipe.prior.folder is None


@pytest.mark.parametrize(
    ("concept", "name"),
    [
        ({"folder": "photos/rex"}, "photos/rex"),
        ({"folder": "s3://bucket/rex"}, "s3://bucket/rex"),
        ({"shards": "a.tar"}, "a.tar"),
        ({"shards": ["a.tar", "b.tar", "c.tar"]}, "a.tar and 2 more"),
        ({"dataset": {"path": "a/b"}}, "a/b"),
    ],
)
def test_a_source_is_called_as_the_recipe_calls_it(concept: dict[str, Any], name: str) -> None:
    assert ConceptConfig.model_validate(concept).source == name


def test_every_source_survives_the_lock_and_has_a_name_of_its_own(tmp_path: Path) -> None:
    concepts = "[{shards: ['s3://b/{0..9}.tar', x.tar]}, {dataset: {path: a/b, skip: [3]}}, {folder: 's3://b/10_zib'}]"
    changes = ["recipe=lora", "prior={kind: none}", f"data.concepts={concepts}"]
    recipe = read_recipe(written(tmp_path, GOOD), changes)
    assert read_recipe(written(tmp_path, lock(recipe), "lock.yaml")) == recipe
    assert list(concept_names(recipe)) == ["s3-b-0..9-.tar-and-1-more", "a-b", "s3-b-10_zib"]
    assert recipe.data.concepts[2].folder_name is not None
