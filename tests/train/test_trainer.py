from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_run import ToyBatches, build, recipe

from finetune.adapter import ParameterGroup
from finetune.engines import Reached, came_of
from finetune.engines.pieces import require_plain
from finetune.errors import GuardError, UserError
from finetune.train.guards import GradientWatch, NormGuard, require_one_home
from finetune.train.trainer import Trainer


def run(trainer: Trainer, **options: Any) -> dict[str, Tensor]:
    for batch in trainer.steps(ToyBatches(trainer.recipe, trainer.processes, **options)):
        trainer.update(batch)
    return trainer.finish()[0].tensors


def reached(parameters: Sequence[nn.Parameter]) -> list[Reached]:
    return [came_of(parameter.grad) for parameter in parameters]


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_writes_down_every_step(tmp_path: Path) -> None:
    trainer, networks = build(recipe(tmp_path / "run", steps=40), dropout=0.0)
    frozen = networks["denoiser"].layers[0].weight.clone()
    run(trainer)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert sum(row["loss"] for row in rows[-5:]) < 0.7 * sum(row["loss"] for row in rows[:5])
    for row in rows:
        parts = row["loss_instance"] + row["loss_prior"]
        assert parts / 2 == pytest.approx(row["loss"], rel=1e-5)  # one of each in every batch of two
        assert row["seconds"] > 0 and row["samples_per_second"] > 0 and row["peak_memory"] > 1 << 20
    assert torch.equal(networks["denoiser"].layers[0].weight, frozen)
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_accumulation_equals_the_bigger_batch(tmp_path: Path) -> None:
    """Weights after 5 updates, plain SGD, so that nothing hides a wrong scale."""
    plain = {"optimizer": {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0}, "steps": 5, "max_grad_norm": 1e6}
    whole = run(build(recipe(tmp_path / "1", batch_size=8, **plain), dropout=0.0)[0])
    parts = run(build(recipe(tmp_path / "4", batch_size=2, gradient_accumulation_steps=4, **plain), dropout=0.0)[0])
    for name, value in whole.items():
        assert torch.allclose(value, parts[name], rtol=0, atol=1e-6), name
    losses = zip(metrics(tmp_path / "1"), metrics(tmp_path / "4"), strict=True)
    assert all(one["loss"] == pytest.approx(other["loss"], rel=1e-6) for one, other in losses)


def test_clipping_clips(tmp_path: Path) -> None:
    """An SGD step is then no longer than learning rate times the limit; the norm before is logged."""
    plain = {"optimizer": {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0}, "steps": 1, "learning_rate": 1.0}
    moves, norms = [], []
    for limit in (1e-3, 1e6):
        trainer, _ = build(recipe(tmp_path / str(limit), max_grad_norm=limit, **plain))
        before = {name: value.clone() for name, value in trainer.adapter.weights().tensors.items()}
        after = run(trainer)
        moves.append(torch.cat([(after[name] - before[name]).flatten() for name in before]).norm().item())
        norms.append(metrics(tmp_path / str(limit))[0]["grad_norm"])
    assert norms[0] == norms[1] > 0.1
    assert moves[0] == pytest.approx(1e-3, rel=1e-3)
    assert moves[1] == pytest.approx(norms[1], rel=1e-3)


def test_clipping_by_value_cuts_each_number_and_leaves_the_norm_alone(tmp_path: Path) -> None:
    """METHODS §4.3: an SGD step with rate 1 is the cut gradient itself; the norm before is logged."""
    plain = {"optimizer": {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0}, "steps": 1, "learning_rate": 1.0}
    moves, limit = [], 0.05
    runs = {"cut": {"max_grad_value": limit, "max_grad_norm": 1e-3}, "whole": {"max_grad_norm": 1e6}}
    for folder, limits in runs.items():
        trainer, _ = build(recipe(tmp_path / folder, **limits, **plain))
        before = {name: tensor.clone() for name, tensor in trainer.adapter.weights().tensors.items()}
        after = run(trainer)
        moves.append(torch.cat([(after[name] - before[name]).flatten() for name in before]))
    cut, whole = moves
    assert float(whole.abs().max()) > limit > float(whole.abs().min())
    torch.testing.assert_close(cut, whole.clamp(-limit, limit), rtol=1e-4, atol=1e-6)
    assert metrics(tmp_path / "cut")[0]["grad_norm"] == metrics(tmp_path / "whole")[0]["grad_norm"]


def test_rates_step_by_step_and_the_end_they_bring(tmp_path: Path) -> None:
    """METHODS §4.3: after the last pair's step, training stops; groups keep their proportions."""
    rates = {"rates": "0.1:2, 0.02:3"}
    run(build(recipe(tmp_path / "run", steps=50, schedule=rates), last_rate=0.01)[0])
    rows = metrics(tmp_path / "run")
    assert [row["learning_rate_first"] for row in rows] == pytest.approx([0.1, 0.1, 0.02])
    assert [row["learning_rate_last"] for row in rows] == pytest.approx([0.01, 0.01, 0.002])


def test_groups_have_their_own_learning_rates(tmp_path: Path) -> None:
    schedule = {"name": "linear", "warmup_steps": 2}
    run(build(recipe(tmp_path / "run", steps=4, learning_rate=0.1, schedule=schedule), last_rate=0.01)[0])
    rows = metrics(tmp_path / "run")
    assert [row["learning_rate_first"] for row in rows] == pytest.approx([0.05, 0.1, 0.1, 0.05])
    assert [row["learning_rate_last"] for row in rows] == pytest.approx([0.005, 0.01, 0.01, 0.005])


def test_a_loss_that_is_not_finite_names_its_pictures_and_changes_nothing(tmp_path: Path) -> None:
    trainer, _ = build(recipe(tmp_path / "run", ema={"decay": 0.9}, gradient_accumulation_steps=2))
    batches = ToyBatches(trainer.recipe, trainer.processes, nan_at=(3, 0))
    before: dict[str, Tensor] = {}
    with pytest.raises(GuardError, match=r"loss of step 4 is not finite on process 0 \(5.png, 6.png\)"):
        for batch in trainer.steps(batches):
            if trainer.step == 3 and not before:
                before = trainer.adapter.weights().tensors
            trainer.update(batch)
    after = trainer.adapter.weights().tensors
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3]


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    trainer, networks = build(recipe(tmp_path / "run"))
    networks["denoiser"].last.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = trainer.adapter.weights().tensors
    with pytest.raises(GuardError, match=r"gradient of step 1 is not finite"):
        run(trainer)
    after = trainer.adapter.weights().tensors
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_finish_leaves_the_average_in_the_networks(tmp_path: Path) -> None:
    trainer, networks = build(recipe(tmp_path / "run", ema={"decay": 0.5}))
    exported = run(trainer)
    assert torch.equal(exported["denoiser.last.bias"], networks["denoiser"].last.bias)
    plain, _ = build(recipe(tmp_path / "plain"))
    assert not torch.equal(run(plain)["denoiser.last.bias"], exported["denoiser.last.bias"])
    assert not networks["denoiser"].training


def test_averaged_is_the_average_inside_and_nothing_outside(tmp_path: Path) -> None:
    seen = {}
    for name, look in (("looking", True), ("not", False)):
        trainer, networks = build(recipe(tmp_path / name, ema={"decay": 0.9}))
        for batch in trainer.steps(ToyBatches(trainer.recipe, trainer.processes)):
            trainer.update(batch)
            if look and trainer.every(2):
                inner = networks["denoiser"].last.weight.detach().clone()
                with trainer.averaged():
                    assert not torch.equal(inner, networks["denoiser"].last.weight)
                torch.rand(3)  # a body may draw numbers: the run does not depend on the global generator
        seen[name] = trainer.finish()[0].tensors
    assert all(torch.equal(seen["looking"][name], seen["not"][name]) for name in seen["not"])


def test_float16_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fp16"):
        build(recipe(tmp_path / "run", mixed_precision="fp16", device="cpu"))


def test_bfloat16_trains_float32_weights(tmp_path: Path) -> None:
    exported = run(build(recipe(tmp_path / "run", mixed_precision="bf16"))[0])
    assert {value.dtype for value in exported.values()} == {torch.float32}
    plain = run(build(recipe(tmp_path / "plain"))[0])
    assert not torch.equal(exported["denoiser.last.weight"], plain["denoiser.last.weight"])


def test_a_parameter_must_be_in_the_optimizer_exactly_once() -> None:
    one, two, three = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    networks = nn.ModuleDict({"denoiser": nn.ParameterDict({"one": one, "two": two})})  # type: ignore[dict-item]
    groups = [ParameterGroup("denoiser", {"denoiser.one": one, "denoiser.two": two})]
    with pytest.raises(GuardError, match=r"denoiser.two \(0 times\)"):
        require_one_home(networks, groups, torch.optim.SGD([one]))
    require_one_home(networks, groups, torch.optim.SGD([one, two]))
    with pytest.raises(GuardError, match=r"no group of the adapter: denoiser.two"):
        require_one_home(networks, [ParameterGroup("denoiser", {"denoiser.one": one})], torch.optim.SGD([one]))
    with pytest.raises(GuardError, match="frozen"):
        require_one_home(networks, [ParameterGroup("x", {"x": three.requires_grad_(False)})], torch.optim.SGD([one]))
    with pytest.raises(GuardError, match="nothing to train"):
        require_one_home(networks, [ParameterGroup("x", {})], torch.optim.SGD([one]))


def gradients(parameters: dict[str, nn.Parameter], values: dict[str, float | None]) -> None:
    for name, value in values.items():
        parameters[name].grad = None if value is None else torch.full((1,), value)


def test_a_tensor_outside_the_loss_is_named_in_the_first_step() -> None:
    parameters = {name: nn.Parameter(torch.zeros(1)) for name in ("a", "b")}
    gradients(parameters, {"a": 1.0, "b": None})
    with pytest.raises(GuardError, match="no gradient reaches b"):
        GradientWatch([ParameterGroup("denoiser", parameters)]).look(reached)


def test_a_gradient_may_be_zero_once_and_not_twice() -> None:
    """A LoRA's A has none in the first update, because B is zero."""
    parameters = {name: nn.Parameter(torch.zeros(1)) for name in ("a", "b", "c")}
    watch = GradientWatch([ParameterGroup("denoiser", parameters)])
    gradients(parameters, {"a": 0.0, "b": 1.0, "c": 0.0})
    watch.look(reached)
    gradients(parameters, {"a": 1.0, "b": 0.0, "c": 0.0})
    with pytest.raises(GuardError, match=r"gradient of c was zero in each of the first 2"):
        watch.look(reached)


def test_a_word_that_the_first_batches_do_not_hold_is_waited_for() -> None:
    """With caption dropout, or class pictures in one batch with the others (``prior.layout: mixed``)."""
    word = {"new": nn.Parameter(torch.zeros(1))}
    watch = GradientWatch([ParameterGroup("embedding", word, patience=4)])
    for _ in range(3):
        gradients(word, {"new": 0.0})
        watch.look(reached)
    with pytest.raises(GuardError, match=r"gradient of new was zero in each of the first 4"):
        watch.look(reached)


def test_overflows_in_a_row_end_a_float16_run() -> None:
    guard = NormGuard(patience=3)
    for norm in (1.0, float("inf"), float("nan"), 1.0, float("inf"), float("inf")):
        guard.check(norm, 1, ["a.png"])
    with pytest.raises(GuardError, match=r"gradient of step 7 is not finite.*a.png"):
        guard.check(float("nan"), 7, ["a.png"])


@pytest.mark.parametrize(("key", "value"), [("quantize", {"kind": "int8"}), ("block_swap", 2)])
def test_weights_with_a_place_of_their_own_are_not_dealt_out(tmp_path: Path, key: str, value: object) -> None:
    config = recipe(tmp_path / "run", steps=1)
    model = type(config.model).model_validate({key: value})
    with pytest.raises(UserError, match=rf"model\.{key} does not work with FSDP2"):
        require_plain(config.model_copy(update={"model": model}), "FSDP2")
