"""Pivotal tuning: words and weights together, and which of them rests when (METHODS 7)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.adapters import attach
from finetune.adapters.embedding import Embedding
from finetune.adapters.pivotal import Pivotal
from finetune.batch import Batch, Posterior
from finetune.config.adapters import EmbeddingConfig, PivotalConfig
from finetune.config.schema import ModelConfig, Recipe
from finetune.denoise import training_loss
from finetune.distributed import start
from finetune.errors import Stopped, UserError
from finetune.families import load_family
from finetune.family import ModelFamily
from finetune.randomness import generator
from finetune.train import Trainer

WORDS: dict[str, Any] = {
    "kind": "embedding",
    "tokens": [{"token": "<t>", "vectors": 2, "initializer": "star"}],
    "norm": {"kind": "std"},
    "regularisation": 0.01,
}
LORA: dict[str, Any] = {"kind": "lora", "rank": 2}
FULL = {"kind": "full", "select": "cross-kv", "detach_start": True}
CAPTIONS = ("a red <t>", "a <t> on grass", "a photo of a <t>")


def section(weights: dict[str, Any] = LORA, **changes: Any) -> dict[str, Any]:
    return {"kind": "pivotal", "embedding": WORDS, "weights": weights, "embedding_learning_rate": 5e-3, **changes}


def recipe(output: Path, tiny: Path, adapter: dict[str, Any], steps: int = 6, **sections: Any) -> Recipe:
    train = {"steps": steps, "batch_size": 2, "learning_rate": 1e-2, "optimizer": {"weight_decay": 0.1}, "threads": 1}
    return Recipe.model_validate(
        {
            "recipe": "pivotal" if adapter["kind"] == "pivotal" else "textual_inversion",
            "output": str(output),
            "model": {"path": str(tiny)},
            "adapter": adapter,
            "data": {"concepts": [{"folder": "pictures", "prompt": "a <t>"}], "resolution": 16},
            "checkpoint": {"every": 1},
            **sections,
            "train": {**train, **sections.get("train", {})},
        }
    )


class Pictures:
    """Random latents with three captions in turn, the same for a given step."""

    def from_step(self, step: int) -> Iterator[Batch]:
        while True:
            mean = torch.randn(2, 4, 8, 8, generator=generator(1, "test", step))
            yield Batch(
                ids=("a.png", "b.png"),
                draws=(2 * step, 2 * step + 1),
                captions=tuple(CAPTIONS[(2 * step + place) % 3] for place in range(2)),
                posterior=Posterior(mean=mean, logvar=torch.full_like(mean, -3.0)),
                prior=torch.tensor([False, False]),
                weight=torch.ones(2),
                geometry=torch.zeros(2, 6, dtype=torch.int64),
                class_captions=("a star", "a star"),
            )
            step += 1


class Run:
    """A run with everything that was trained written down after each update."""

    def __init__(self, run: Recipe, *, stop: int | None = None, remember: bool = True) -> None:
        processes = start(run.train)
        self.family = load_family(run.model)
        self.adapter: Any = attach(run.adapter, self.family, run.seed)
        if not remember:
            del self.family.encode_prompt  # type: ignore[attr-defined]
        self.trainer: Trainer
        self.encoded: list[int] = []
        encoder: Any = self.family.networks["text_encoder"]
        encoder.register_forward_hook(lambda *_: self.encoded.append(self.trainer.step))
        self.trainer = Trainer(
            run,
            processes,
            self.family.networks,
            self.adapter,
            lambda batch: training_loss(self.family, self.adapter, batch, run),
        )
        self.losses: list[Tensor] = []
        self.seen = [self.state()]
        for batch in self.trainer.steps(Pictures()):
            self.losses.append(self.trainer.update(batch))
            self.seen.append(self.state())
            if self.trainer.step == stop:
                self.trainer._stopping = "test"
        self.parts = self.trainer.finish()

    def state(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.family.networks.named_parameters()}

    def moved(self, update: int) -> set[str]:
        """Which groups update ``update`` (from 0) moved; "?" for anything else."""
        before, after = self.seen[update], self.seen[update + 1]
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        owners = {id(p): group.name for group in self.adapter.groups() for p in group.parameters.values()}
        named = dict(self.family.networks.named_parameters())
        return {owners.get(id(named[name]), "?") for name in changed}


def attached(folder: Path, **changes: Any) -> tuple[ModelFamily, Pivotal]:
    family = load_family(ModelConfig(path=str(folder)))
    adapter = attach(PivotalConfig.model_validate(section(**changes)), family, 0)
    assert isinstance(adapter, Pivotal)
    adapter.begin_run(10)
    adapter.begin_step(0)
    return family, adapter


def answer(family: ModelFamily, caption: str = "a red <t>") -> Tensor:
    noisy = torch.randn(1, 4, 8, 8, generator=generator(0, "noisy"))
    prompt = family.encode_prompt([caption])
    return family.predict(noisy, torch.tensor([300]), prompt, torch.zeros(1, 6, dtype=torch.int64))


def randomise(adapter: Pivotal) -> None:
    with torch.no_grad():
        for group in adapter.groups():
            for name, parameter in group.parameters.items():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator(1, name)))


@pytest.mark.parametrize("weights", [LORA, FULL], ids=["lora", "full"])
def test_in_the_first_phase_only_words_move_and_in_the_second_only_weights(
    weights: dict[str, Any], tmp_path: Path, tiny_sd: Path
) -> None:
    """METHODS 7: phase 1 changes only token rows; at the pivot rows freeze bit-exactly and the LoRA goes on."""
    run = Run(recipe(tmp_path / "run", tiny_sd, section(weights, mode="two-phase", pivot=0.5)))
    assert [run.moved(update) for update in range(6)] == [{"embedding"}] * 3 + [{"denoiser"}] * 3


@pytest.mark.parametrize("norm", ["hard", "decay", "std"])
def test_together_until_the_pivot_then_words_rest_bit_for_bit(norm: str, tmp_path: Path, tiny_sd: Path) -> None:
    """METHODS 7: neither weight decay, momentum nor the pull of a norm moves a word after the pivot."""
    adapter = section(embedding=WORDS | {"norm": {"kind": norm}}, pivot=0.4)
    run = Run(recipe(tmp_path / "run", tiny_sd, adapter, train={"ema": {"decay": 0.5}}))
    assert run.adapter.pivot == 2
    assert [run.moved(update) for update in range(6)] == [{"embedding", "denoiser"}] * 2 + [{"denoiser"}] * 4


def test_with_a_lora_in_the_text_encoder_too(tmp_path: Path, tiny_sd: Path) -> None:
    """METHODS 7: in the second phase the text encoder may learn as well; then captions are encoded in every step."""
    weights = LORA | {"text_encoder": True, "text_encoder_learning_rate": 1e-3}
    run = Run(recipe(tmp_path / "run", tiny_sd, section(weights, mode="two-phase")))
    assert [run.moved(update) for update in range(6)] == [{"embedding"}] * 3 + [{"denoiser", "text_encoder"}] * 3
    assert {5} <= set(run.encoded)


def test_each_group_has_its_own_learning_rate_before_and_after(tmp_path: Path, tiny_sd: Path) -> None:
    """METHODS 7: lr of groups before and after. What rests does so without a rate of 0, which a schedule would undo."""
    Run(recipe(tmp_path / "run", tiny_sd, section()))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["learning_rate_embedding"] for row in rows] == pytest.approx([5e-3] * 6)
    assert [row["learning_rate_denoiser"] for row in rows] == pytest.approx([1e-2] * 6)
    assert ["loss_penalty" in row for row in rows] == [True] * 3 + [False] * 3


def test_words_alone_are_textual_inversion(tmp_path: Path, tiny_sd: Path) -> None:
    """METHODS 7: "TI then LoRA" with no steps of LoRA equals section 2's result."""
    adapter = section(mode="two-phase", pivot=1.0)
    both = Run(recipe(tmp_path / "both", tiny_sd, adapter, train={"learning_rate": 5e-3}))
    alone = Run(recipe(tmp_path / "alone", tiny_sd, WORDS, train={"learning_rate": 5e-3}))
    assert isinstance(alone.adapter, Embedding)
    (expected,), words = alone.parts, both.parts[1]
    assert words.kind == expected.kind == "embedding"
    assert all(torch.equal(words.tensors[name], value) for name, value in expected.tensors.items())
    assert not torch.equal(words.tensors["text_encoder.<t>"], alone.adapter.tables["text_encoder"].start)


@pytest.mark.parametrize("prior", ["none", "model"])
def test_from_the_pivot_on_captions_are_encoded_once_with_the_same_losses(
    prior: str, tmp_path: Path, tiny_sd: Path
) -> None:
    """METHODS 7: cached text embeddings where nothing in the text encoder trains any more."""
    runs = {
        name: Run(
            recipe(tmp_path / name, tiny_sd, section(pivot=0.5), steps=10, prior={"kind": prior}),
            remember=name == "remembered",
        )
        for name in ("remembered", "anew")
    }
    remembered, anew = runs["remembered"], runs["anew"]
    assert [loss.item() for loss in remembered.losses] == [loss.item() for loss in anew.losses]
    assert all(torch.equal(value, anew.seen[-1][name]) for name, value in remembered.seen[-1].items())
    # three captions; of the class "a star" as trained and as untouched
    assert sum(step >= 5 for step in remembered.encoded) == (3 if prior == "none" else 5)
    assert sum(step >= 5 for step in anew.encoded) == (5 if prior == "none" else 15)


@pytest.mark.parametrize("cut", [1, 3, 4])
@pytest.mark.parametrize("mode", ["concurrent", "two-phase"])
def test_an_interruption_in_any_phase_changes_no_bit(mode: str, cut: int, tmp_path: Path, tiny_sd: Path) -> None:
    adapter = section(mode=mode)
    whole = Run(recipe(tmp_path / "whole", tiny_sd, adapter))
    with pytest.raises(Stopped):
        Run(recipe(tmp_path / "cut", tiny_sd, adapter), stop=cut)
    again = Run(recipe(tmp_path / "cut", tiny_sd, adapter))
    for one, other in zip(whole.parts, again.parts, strict=True):
        assert all(torch.equal(value, other.tensors[name]) for name, value in one.tensors.items())


def test_what_was_remembered_is_forgotten_when_a_word_moves(tiny_sd: Path) -> None:
    """As when the moving average takes the words' place for a while."""
    family, adapter = attached(tiny_sd)
    adapter.begin_step(9)
    before = family.encode_prompt(["a <t>"]).tokens
    assert family.encode_prompt(["a <t>"]).tokens.data_ptr() != 0
    assert torch.equal(family.encode_prompt(["a <t>"]).tokens, before)
    (rows,) = adapter.groups()[0].parameters.values()
    trained = rows.data
    rows.data = trained + 1.0
    assert not torch.equal(family.encode_prompt(["a <t>"]).tokens, before)
    rows.data = trained
    assert torch.equal(family.encode_prompt(["a <t>"]).tokens, before)


@pytest.mark.parametrize("weights", [LORA, FULL, LORA | {"text_encoder": True}], ids=["lora", "full", "text"])
@pytest.mark.parametrize("step", [0, 9])
def test_disabled_is_the_untouched_model(weights: dict[str, Any], step: int, tiny_sd: Path) -> None:
    bare = load_family(ModelConfig(path=str(tiny_sd)))
    bare.require("denoiser", "text_encoder")
    family, adapter = attached(tiny_sd, weights=weights)
    randomise(adapter)
    adapter.begin_step(step)
    with torch.no_grad():
        trained = answer(family), answer(family, "a red star")
        with adapter.disabled():
            assert torch.equal(answer(family, "a red star"), answer(bare, "a red star"))
            assert torch.equal(answer(family, "a red <t>"), answer(bare, "a red star star"))  # where it began
        assert torch.equal(answer(family), trained[0])
        assert torch.equal(answer(family, "a red star"), trained[1])
        assert not torch.equal(trained[1], answer(bare, "a red star"))


def test_weights_come_back_and_parts_are_exported_for_themselves(tiny_sd: Path) -> None:
    family, adapter = attached(tiny_sd)
    randomise(adapter)
    saved = adapter.weights()
    assert [part.weights().kind for part in adapter.parts()] == ["lora", "embedding", "pivotal"]
    again, other = attached(tiny_sd)
    other.load(saved.tensors)
    assert torch.equal(answer(again), answer(family))
    with pytest.raises(UserError, match="missing"):
        other.load({})


@pytest.mark.parametrize(
    ("mode", "pivot", "steps", "expected"),
    [
        ("concurrent", 0.5, 10, 5),
        ("concurrent", 0.01, 10, 1),  # a share that rounds to nothing still is a step
        ("concurrent", 1.0, 10, 10),
        ("two-phase", 0.99, 10, 9),
        ("two-phase", 1.0, 10, 10),
    ],
)
def test_the_pivot_is_a_share_of_the_steps(mode: str, pivot: float, steps: int, expected: int, tiny_sd: Path) -> None:
    _, adapter = attached(tiny_sd, mode=mode, pivot=pivot)
    adapter.begin_run(steps)
    assert adapter.pivot == expected


def test_a_run_too_short_for_two_phases_is_refused(tiny_sd: Path) -> None:
    family = load_family(ModelConfig(path=str(tiny_sd)))
    adapter = Pivotal(PivotalConfig.model_validate(section(mode="two-phase")), family, 0)
    with pytest.raises(RuntimeError, match="begin_run"):
        adapter.resting(0)
    with pytest.raises(UserError, match="2 steps at least"):
        adapter.begin_run(1)


def test_growing_words_stay_as_long_as_they_were_when_they_rest(tiny_sd: Path) -> None:
    words = EmbeddingConfig.model_validate(
        {"kind": "embedding", "tokens": [{"token": "<t>", "vectors": 3}], "progressive_steps": 2}
    )
    family, adapter = attached(tiny_sd, embedding=words)
    (vocabulary,) = family.sites.vocabularies
    lengths = []
    for step in range(10):
        adapter.begin_step(step)
        lengths.append(len(vocabulary.expand("<t>").split()))
    assert lengths == [1, 1, 2, 2, 3, 3, 3, 3, 3, 3]
