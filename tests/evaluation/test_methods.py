"""The study of methods runs each on what it is for, once, and says honestly what came out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune import tinyworld
from finetune.config import read_recipe
from finetune.errors import UserError
from finetune.evaluation import comparison, methods, trials
from finetune.evaluation.protocol import Evaluation, Figures
from finetune.evaluation.taught import Taught

ROOT = Path(__file__).parents[2]


def figures(fidelity: float) -> Figures:
    return Figures(fidelity, fidelity, fidelity, 0.9, {"shape": 0.9}, 0.1, 0.7)


def result(method: str, seed: int, after: float, kind: str = "subject") -> methods.Result:
    found = Evaluation(seed, 0.0, 1.0, 1.0, 0.9, figures(0.05), figures(after), kind=kind)  # type: ignore[arg-type]
    trial = methods.Trial(method, Taught(kind, seed))  # type: ignore[arg-type]
    return methods.Result(trial, trials.Outcome(60.0, 10**9, found), 2_000_000, 12345)


def test_every_method_runs_on_all_that_it_is_for() -> None:
    wanted = methods.trials_of(["lora", "aesthetic", "wrong-noun"], [101, 102], [201])
    assert [one.name for one in wanted] == [
        *("subject-101-lora", "subject-101-wrong-noun", "subject-102-lora", "subject-102-wrong-noun"),
        *("style-201-lora", "style-201-aesthetic"),
    ]
    with pytest.raises(UserError, match="did you mean 'lora'"):
        methods.trials_of(["lorra"], [1], [])


@pytest.mark.parametrize("trial", methods.trials_of(list(methods.METHODS), [101], [201]), ids=lambda trial: trial.name)
def test_recipes_of_all_methods_are_right(trial: methods.Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = read_recipe(trial.recipe, trial.overrides)
    assert recipe.data.concepts[0].folder == f"tinyworld:{trial.taught.kind}/{trial.taught.seed}"
    assert recipe.report.enabled and len(recipe.report.prompts) == (20 if trial.method == "aesthetic" else 0)
    if trial.taught.kind == "style":
        assert recipe.prior.kind == "none"


def test_nouns_are_the_subject_s_another_or_none() -> None:
    one = tinyworld.subject(101)
    said = {
        name: next(change for change in methods.Trial(name, Taught("subject", 101)).overrides if ".prompt=" in change)
        for name in ("right-noun", "wrong-noun", "no-noun")
    }
    assert said["right-noun"].endswith(f" {one.token} {one.shape}")
    assert said["no-noun"].endswith(f"a {one.token}")
    wrong = said["wrong-noun"].split()[-1]
    assert wrong in tinyworld.FACTORS["shape"] and wrong != one.shape


def test_claims_are_of_differences_on_the_same_subjects_and_can_fail() -> None:
    good = [result("lora", 1, 0.8), result("ti-1", 1, 0.4), result("lora", 2, 0.7), result("ti-1", 2, 0.5)]
    good += [result("ti-1", 3, 0.9)]  # without a partner
    found = comparison.claims(good)
    assert [claim.holds for claim in found] == [True, True]
    assert found[0].found.mean == pytest.approx(0.3)
    bad = [result("lora", 1, 0.3), result("ti-1", 1, 0.4), result("ti-4", 1, 0.2)]
    assert [(claim.holds, str(claim)[:4]) for claim in comparison.claims(bad)] == [
        *((False, "FAIL"), (True, "pass"), (True, "pass"), (False, "FAIL")),
    ]
    assert comparison.claims([result("lora", 201, 0.8, "style")]) == []


def test_the_table_has_a_row_for_each_method_and_names_failures() -> None:
    found = [result("lora", 1, 0.8), result("lora", 201, 0.6, "style"), result("aesthetic", 201, 0.1, "style")]
    found.append(methods.Result(methods.Trial("dora", Taught("subject", 1)), failure="ended with exit code 2\nmore"))
    titles = {name: method.title for name, method in methods.METHODS.items()}
    where = {"machine": {"processor": "p", "memory": "m"}, "versions": {"torch": "2"}, "study": {"command": "c"}}
    text = comparison.section(found, titles, comparison.claims(found), where)
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    }
    assert rows["LoRA"][:2] == ["0.80 [0.80, 0.80]", "0.60 [0.60, 0.60]"]
    assert rows["LoRA"][-4:] == ["2 MB", "12,345", "60 s", "1.00 GB"]
    assert rows["aesthetic gradients"][:2] == ["–", "0.10 [0.10, 0.10]"]
    assert rows["untouched"][:2] == ["0.05 [0.05, 0.05]", "0.05 [0.05, 0.05]"]
    assert set(rows["DoRA"]) == {"–"}
    assert "**failed**: subject-1-dora: ended with exit code 2" in text and "more" not in text.split("failed")[1][:60]


def test_another_model_has_an_untouched_row_of_its_own() -> None:
    own, other = result("lora", 1, 0.8), result("flow", 1, 0.9)
    assert own.outcome and other.outcome
    evaluation = replace(other.outcome.evaluation, before=figures(-0.2))
    other = replace(other, outcome=replace(other.outcome, evaluation=evaluation))
    titles = {name: method.title for name, method in methods.METHODS.items()}
    where = {"machine": {"processor": "p", "memory": "m"}, "versions": {"torch": "2"}, "study": {"command": "c"}}
    for order in ([own, other], [other, own]):
        lines = comparison.section(order, titles, [], where).splitlines()
        begin = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in lines if line.startswith("|")}
        assert begin["untouched"].startswith("0.05") and begin["untouched, flow matching"].startswith("-0.20")
    assert "flow matching |" not in comparison.section([own], titles, [], where)


def test_numbers_trained_are_read_from_the_checkpoint(tmp_path: Path) -> None:
    assert methods.trained_in(tmp_path) == 0
    (tmp_path / "step-000003").mkdir()
    tensors = {"trained/a": torch.zeros(3, 4), "trained/b": torch.zeros(5), "average/a": torch.zeros(3, 4)}
    save_file(tensors, tmp_path / "step-000003" / "state.safetensors")
    assert methods.trained_in(tmp_path) == 17


def test_a_study_goes_on_after_a_failure_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    started: list[str] = []

    def watched(command: list[str], log: Path) -> tuple[int, int]:
        keys = dict(word.split("=", 1) for word in command[5:])
        folder = Path(keys["output"])
        started.append(folder.name)
        assert command[1:4] == ["-m", "finetune", "train"] and keys["export.formats"] == "[diffusers]"
        assert keys["train.steps"] == "30"
        if folder.name == "subject-102-lora":
            return 4, 0
        kind, seed, _ = folder.name.split("-")
        evaluation = Evaluation(int(seed), 0.0, 1.0, 1.0, 0.9, figures(0.0), figures(0.8), kind=kind)  # type: ignore[arg-type]
        evaluation.write(folder)
        return 0, 10**9

    monkeypatch.setattr(trials, "watched", watched)
    page = tmp_path / "page.md"
    page.write_text("# Methods\n")
    arguments = ["--subjects", "101,102", "--styles", "201", "--methods", "lora", "--jobs", "2"]
    arguments += ["--out", str(tmp_path / "runs"), "--page", str(page), "train.steps=30"]
    assert methods.main(arguments) == 4
    assert "1 of 3 runs failed: subject-102-lora" in capsys.readouterr().err
    assert methods.main(arguments) == 4
    assert sorted(started) == ["style-201-lora", "subject-101-lora", "subject-102-lora", "subject-102-lora"]
    text = page.read_text()
    assert text.startswith("# Methods\n") and text.count(comparison.BEGIN) == 1 and "**failed**" in text
    record = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert [run["trial"]["taught"]["seed"] for run in record["runs"]] == [101, 102, 201]
