from pathlib import Path

import pytest
import torch

from finetune.errors import UserError
from finetune.tinyworld import document, gates, unseen
from finetune.tinyworld.build import Budget
from finetune.tinyworld.subject import Subject, subject
from finetune.tinyworld.training.data import INDIVIDUALS, SCENES


class Constant:
    """A judge that sees the same in every picture."""

    def attribute_names(self, pictures: list[int]) -> list[dict[str, str]]:
        return [{"shape": "star", "colour": "red", "fill": "solid", "size": "small"} for _ in pictures]


def test_accuracy_counts_named_factors_only_and_each_name_once() -> None:
    named = [{"shape": "star"}, {"shape": "ring", "colour": "red"}, {"colour": "red"}]
    read = gates.accuracy_by_factor(Constant(), [0, 1, 2], named)  # type: ignore[arg-type]
    assert read == {"shape": 0.5, "colour": 1.0, "all": 0.75}


def test_likeness_of_perfect_and_of_blind_embeddings() -> None:
    cast = twins()
    assert gates.likeness(torch.eye(2).repeat_interleave(2, 0), cast) == (1.0, 0.0)
    assert gates.likeness(torch.ones(4, 1), cast) == (1.0, 1.0)


def twins() -> list[Subject]:
    """Two individuals of one class."""
    first = subject(0)
    return [first, next(one for one in map(subject, range(1, 99)) if one.shape == first.shape)]


def test_a_gate_looks_in_its_direction() -> None:
    assert gates.Gate("", 0.98, 0.97).passed
    assert not gates.Gate("", 0.96, 0.97).passed
    assert gates.Gate("", 0.01, 0.05, at_least=False).passed


def test_unseen_captions_are_of_scenes_that_no_training_set_holds() -> None:
    assert unseen.UNSEEN not in {SCENES[0], INDIVIDUALS[0]}
    assert [text for text, _, _ in unseen.unseen_captions(5)] == [text for text, _, _ in unseen.unseen_captions(9)][:5]


def test_a_scaled_budget_scales_every_stage_and_no_process() -> None:
    full, tenth = Budget(), Budget().scaled(0.1)
    assert (tenth.vae, tenth.unet, tenth.workers) == (full.vae // 10, full.unet // 10, full.workers)
    assert Budget().scaled(1e-9).clip == 1


def test_filling_replaces_between_markers_only(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- gates -->\nold\n<!-- /gates -->\nafter\n")
    document.fill(page, "gates", document.gate_table([gates.Gate("size", 1, 2, at_least=False)]))
    assert "old" not in page.read_text()
    assert "| size | 1.000 | ≤ 2 | passed |" in page.read_text()
    document.fill(page, "gates", "new")
    assert page.read_text() == "before\n<!-- gates -->\n\nnew\n\n<!-- /gates -->\nafter\n"
    with pytest.raises(UserError, match="accuracy"):
        document.fill(page, "accuracy", "new")
