"""The study runs each trial once, measures it, and writes down what held and what did not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from finetune.errors import GuardError, UserError
from finetune.evaluation import findings, study, trials
from finetune.evaluation.protocol import Evaluation, Figures

RECIPE = """
import sys
from dataclasses import asdict
from pathlib import Path

from finetune.evaluation.protocol import Evaluation, Figures

keys = dict(word.split("=", 1) for word in sys.argv[3:])
folder = Path(keys["output"])
if folder.name.startswith("13-"):
    sys.exit("unlucky")
with (folder.parent / "started").open("a") as log:
    log.write(folder.name + "\\n")
pres = 0.6 if keys.get("prior.kind") == "none" else 0.1
before = Figures(0.0, 0.05, 0.05, 0.9, {"shape": 0.9}, 0.05, 0.8)
after = Figures(0.5, 0.85, 0.9, 0.88, {"shape": 0.88}, pres, 0.7)
Evaluation(1, 0.0, 0.6, 1.0, 0.9, before, after).write(folder)
"""


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe that is done at once, in place of the real ones."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "__init__.py").touch()
    (tmp_path / "recipes" / "dreambooth.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def result(subject: int, prior: str, fidelity: float = 0.85, accuracy: float = 0.9, pres: float = 0.1) -> study.Result:
    before = Figures(0.0, 0.05, 0.05, 0.9, {"shape": 0.9}, 0.05, 0.8)
    after = Figures(0.5, fidelity, 0.9, accuracy, {"shape": accuracy}, pres, 0.7)
    one = Evaluation(subject, 0.0, 0.6, 1.0, 0.9, before, after)
    return study.Result(study.Trial(subject, "lora", prior), 90.0, 2_000_000_000, one)


def test_a_study_runs_every_combination_once_and_writes_what_held(recipes: Path) -> None:
    page = recipes / "page.md"
    page.write_text("# World\n\nbefore\n")
    arguments = ["--subjects", "1,2", "--priors", "images,none", "--out", "runs", "--page", str(page)]
    assert study.main(arguments) == 0
    assert study.main(arguments) == 0
    started = (recipes / "runs" / "started").read_text().split()
    assert len(started) == len(set(started)) == 2 * 2 * 2
    text = page.read_text()
    assert text.startswith("# World\n\nbefore\n") and text.count(findings.BEGIN) == text.count(findings.END) == 1
    assert "full fine-tuning" in text and "**no**" not in text
    record = json.loads((recipes / "runs" / "results.json").read_text())
    assert len(record["runs"]) == 8 and all(claim["holds"] for claim in record["claims"])
    assert all(run["seconds"] > 0 and run["peak_memory"] > 1_000_000 for run in record["runs"])


def test_a_run_that_fails_ends_the_study_and_is_named(recipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--subjects", "13", "--out", "runs", "--page", str(recipes / "page.md")]
    assert study.main(arguments) == 4
    assert "13-lora-images" in capsys.readouterr().err
    assert "unlucky" in (recipes / "runs" / "13-lora-images.log").read_text()
    assert not (recipes / "page.md").exists()


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'lora'"):
        study.trials([1], ["lorra"], ["none"])


def test_claims_hold_exactly_when_the_means_do() -> None:
    good = [result(1, "images"), result(2, "images"), result(1, "none", pres=0.5), result(2, "none", pres=0.5)]
    assert [claim.holds for claim in findings.claims(good)] == [True, True, True]
    forgetful = [result(1, "images", fidelity=0.3), result(1, "none", pres=0.5)]
    assert [claim.holds for claim in findings.claims(forgetful)] == [False, True, True]
    deaf = [result(1, "images", accuracy=0.7), result(1, "none", pres=0.5)]
    assert [claim.holds for claim in findings.claims(deaf)] == [True, False, True]
    collapsed = [result(1, "images", pres=0.4), result(1, "none", pres=0.5)]
    assert [claim.holds for claim in findings.claims(collapsed)] == [True, True, False]


def test_a_section_replaces_its_older_self_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n\n{findings.BEGIN}\nold\n{findings.END}\n\nbelow\n")
    findings.write_section(page, "new")
    findings.write_section(page, "newer")
    assert page.read_text() == f"above\n\n{findings.BEGIN}\n\nnewer\n\n{findings.END}\n\nbelow\n"


def test_peak_memory_is_of_the_run_alone(tmp_path: Path) -> None:
    held = 300_000_000
    code, peak = trials.watched(
        [sys.executable, "-c", f"x = b'x' * {held}; import time; time.sleep(1)"], tmp_path / "log"
    )
    assert code == 0
    assert held < peak < 2 * held
    assert trials.watched([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log")[0] == 3


def test_a_trial_without_an_evaluation_is_an_error(recipes: Path) -> None:
    (recipes / "recipes" / "dreambooth.py").write_text("")
    with pytest.raises(GuardError, match=r"wrote no evaluation\.json"):
        study.run(study.Trial(1, "lora", "none"), Path("recipe.yaml"), recipes)
