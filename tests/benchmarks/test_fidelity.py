"""The orderings that DreamBooth was published with, on one subject of the embedded world. Takes minutes."""

from pathlib import Path

import pytest

from finetune.evaluation import methods, study
from finetune.evaluation.taught import Taught

RECIPE = Path("recipes/configs/dreambooth-tiny.yaml")


@pytest.mark.slow
@pytest.mark.base
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_subject_is_learnt_and_the_prior_spares_its_class(method: str, tmp_path: Path) -> None:
    wanted = study.trials([211], [method], ["images", "none"])
    kept, lost = (one.evaluation for one in study.results(wanted, RECIPE, tmp_path))
    for found in (kept, lost):
        assert found.after.fidelity > found.before.fidelity + 0.15
    assert kept.after.pres < lost.after.pres - 0.2
    assert kept.after.accuracy > lost.after.accuracy - 0.05, "what a subject costs of accuracy is the study's to say"


@pytest.mark.slow
@pytest.mark.base
def test_the_flow_matching_model_learns_a_subject(tmp_path: Path) -> None:
    found = methods.run(methods.Trial("flow", Taught("subject", 211)), tmp_path).outcome
    assert found is not None
    before, after = found.evaluation.before, found.evaluation.after
    assert after.normalised > before.normalised + 0.4
    assert after.accuracy > before.accuracy - 0.15
