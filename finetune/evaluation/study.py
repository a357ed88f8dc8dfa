"""Several subjects, methods and priors, each a run of a recipe of its own, and one table of what came out.

    python -m finetune.evaluation.study --subjects 101,102,103,104,105 --methods lora,full --priors images,none

Every run is a process of its own, so that its time and its memory are its own. Runs that are finished are not run
again; a run that was interrupted goes on from its last checkpoint. Subjects are named by their seeds: take some that
no setting was chosen by.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from finetune import files
from finetune.errors import GuardError, UserError, nearest
from finetune.evaluation.machine import machine, versions
from finetune.evaluation.protocol import Evaluation
from finetune.evaluation.trials import numbers, words
from finetune.evaluation.trials import run as run_once

METHODS: dict[str, tuple[str, ...]] = {  # what each changes in the recipe
    "lora": (),
    "full": ("adapter.kind=full", "train.learning_rate=3.0e-4"),
}
PRIORS: dict[str, tuple[str, ...]] = {
    "images": (),
    "model": ("prior.kind=model",),
    "none": ("prior.kind=none",),
}


@dataclass(frozen=True)
class Trial:
    """One run of the study."""

    subject: int
    method: str
    prior: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.subject}-{self.method}-{self.prior}"

    @property
    def overrides(self) -> list[str]:
        """What it changes in the recipe."""
        concept = f"data.concepts.0.folder=tinyworld:subject/{self.subject}"
        return [concept, *METHODS[self.method], *PRIORS[self.prior]]


@dataclass(frozen=True)
class Result:
    """What came out of a trial. ``seconds`` and ``peak_memory`` (bytes) are of the whole process."""

    trial: Trial
    seconds: float
    peak_memory: int
    evaluation: Evaluation


def trials(subjects: Sequence[int], methods: Sequence[str], priors: Sequence[str]) -> list[Trial]:
    """Every combination, subject by subject, so that a study that is stopped early has whole subjects.

    Raises:
        UserError: a method or prior is unknown.
    """
    for name, known in [*((one, METHODS) for one in methods), *((one, PRIORS) for one in priors)]:
        if name not in known:
            raise UserError(f"study: {name!r} is unknown{nearest(name, known)}")
    return [Trial(subject, method, prior) for subject in subjects for method in methods for prior in priors]


def run(trial: Trial, recipe: Path, out: Path, overrides: Sequence[str] = ()) -> Result:
    """Run one trial where it has not been; errors as of ``trials.run``."""
    changes = [f"output={out / trial.name}", *trial.overrides, *overrides]
    command = [sys.executable, "-m", "recipes.dreambooth", "--config", str(recipe), *changes]
    found = run_once(trial.name, command, out)
    return Result(trial, found.seconds, found.peak_memory, found.evaluation)


def results(wanted: Sequence[Trial], recipe: Path, out: Path, overrides: Sequence[str] = ()) -> Iterator[Result]:
    """Run the trials one by one."""
    out.mkdir(parents=True, exist_ok=True)
    for number, trial in enumerate(wanted, 1):
        result = run(trial, recipe, out, overrides)
        before, after = result.evaluation.before, result.evaluation.after
        print(
            f"[{number}/{len(wanted)}] {trial.name}: fidelity {before.normalised:.2f} -> {after.normalised:.2f}, "
            f"accuracy {before.accuracy:.2f} -> {after.accuracy:.2f}, PRES* {before.pres:.2f} -> {after.pres:.2f}, "
            f"DIV* {before.div:.2f} -> {after.div:.2f}, {result.seconds:.0f} s",
            flush=True,
        )
        yield result


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 when the figures hold, 4 when they don't or a run failed, 2 for a bad argument."""
    from finetune.evaluation import findings

    options = _options(arguments)
    try:
        wanted = trials(options.subjects, options.methods, options.priors)
        found = list(results(wanted, options.recipe, options.out, options.overrides))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except GuardError as error:
        print(error, file=sys.stderr)
        return 4
    said = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "finetune.evaluation.study", *said])
    where = {"machine": machine(), "versions": versions(), "study": {"command": command}}
    summary = findings.summarise(found)
    claims = findings.claims(found)
    record = {**where, "runs": [asdict(one) for one in found], "claims": [asdict(one) for one in claims]}
    files.write_json(options.out / "results.json", record)
    findings.write_section(options.page, findings.section(found, summary, claims, where))
    for claim in claims:
        print(claim)
    return 0 if all(claim.holds for claim in claims) else 4


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m finetune.evaluation.study", description=summary)
    parser.add_argument("--subjects", type=numbers, default=[101, 102, 103, 104, 105], help="seeds, with commas")
    parser.add_argument("--methods", type=words, default=["lora", "full"], help=", ".join(METHODS))
    parser.add_argument("--priors", type=words, default=["images", "none"], help=", ".join(PRIORS))
    parser.add_argument("--recipe", type=Path, default=Path("recipes/configs/dreambooth-tiny.yaml"))
    parser.add_argument("--out", type=Path, default=Path("runs/fidelity"), help="folder of the runs and results.json")
    parser.add_argument("--page", type=Path, default=Path("docs/tinyworld.md"), help="page whose section is rewritten")
    parser.add_argument("overrides", nargs="*", help="more changes to every run: train.steps=300")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
