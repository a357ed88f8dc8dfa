"""All methods on the same subjects and styles, each a run of its own recipe, and one table of what came out.

    python -m finetune.evaluation.methods --subjects 101,102,103,104,105 --styles 201,202,203 --jobs 2

Subjects are taught as DreamBooth is, with class images beside them, where a method changes weights; styles from their
pictures alone. Runs that are finished are not run again. Words at the end change every run: ``train.steps=200``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from finetune import files, tinyworld
from finetune.config import read_recipe
from finetune.config.checks import FORMATS
from finetune.errors import GuardError, UserError, nearest
from finetune.evaluation import comparison, findings, trials
from finetune.evaluation.machine import machine, versions
from finetune.evaluation.taught import Taught
from finetune.evaluation.trials import Outcome, numbers, words

CONFIGS = Path("recipes/configs")
PRIOR = "prior={kind: images, count: 64, sampler: {steps: 20, guidance: 3.0}}"
ALIKE = ("report.sampler={steps: 20, guidance: 4.0}", "samples.every=null")  # in all runs
WORD = "adapter.tokens.0.initializer=zib"  # a rare word, so that no subject is helped by its start
DREAMBOOTH, PLAIN = ("recipe=dreambooth", PRIOR), ("prior={kind: none}",)
OTHER_WORDS = (  # instead of the set's own captions
    "data.concepts.0.captions=prompt",
    "data.concepts.0.prompt={article} {token}{noun}",
    "data.concepts.0.class_prompt={class_prompt}",
)


@dataclass(frozen=True)
class Method:
    """How a method is run.

    Attributes:
        title: in the table.
        subject, style: the recipe's file, and what it changes there, for a subject and for a style; None where the
            method is not for it.
        noun: which word stands for the subject's class, where the captions are replaced: its own, another, none.
        asks: the recipe wants prompts of its own for the report, and is given the questions.
    """

    title: str
    subject: tuple[str, ...] | None
    style: tuple[str, ...] | None
    noun: Literal["right", "wrong", "none"] = "right"
    asks: bool = False


def _weights(title: str, name: str, *changes: str) -> Method:
    """A method that changes weights: as DreamBooth for subjects, and on its own for styles."""
    file = f"{name}-tiny.yaml"
    return Method(title, (file, *DREAMBOOTH, *changes), (file, *PLAIN, *changes))


def _own(title: str, name: str, *changes: str) -> Method:
    """A method that has a page of its own, for subjects too."""
    return Method(title, (f"{name}-tiny.yaml", *changes), (f"{name}-tiny.yaml", *PLAIN, *changes))


LORA = ("dreambooth-tiny.yaml", "train.steps=300")  # as many as the others
METHODS = {
    "lora": Method("LoRA", LORA, ("lora-tiny.yaml",)),
    "flow": Method("LoRA, flow-matching model", ("dreambooth-flow-tiny.yaml",), None),
    "dora": _weights("DoRA", "dora"),
    "pissa": _weights("PiSSA", "pissa"),
    "lokr": _weights("LoKr", "lokr"),
    "loha": _weights("LoHa", "loha"),
    "oft": _weights("OFT", "oft"),
    "full": Method("full fine-tuning", ("dreambooth-full-tiny.yaml",), ("full-tiny.yaml",)),
    "hypernetwork": _weights("hypernetwork", "hypernetwork"),
    "ti-1": _own("textual inversion, 1 vector", "textual-inversion", "adapter.tokens.0.vectors=1", WORD),
    "ti-4": _own("textual inversion, 4 vectors", "textual-inversion", "adapter.tokens.0.vectors=4", WORD),
    "pivotal": _own("pivotal tuning, concurrent", "pivotal", "adapter.mode=concurrent"),
    "custom": _own("Custom Diffusion", "custom-diffusion"),
    "aesthetic": Method("aesthetic gradients", None, ("aesthetic-tiny.yaml",), asks=True),
    "right-noun": Method("LoRA, right class noun alone", (*LORA, *OTHER_WORDS), None, "right"),
    "wrong-noun": Method("LoRA, wrong class noun", (*LORA, *OTHER_WORDS), None, "wrong"),
    "no-noun": Method("LoRA, no class noun", (*LORA, *OTHER_WORDS), None, "none"),
}


@dataclass(frozen=True)
class Trial:
    """One method on one subject or style."""

    method: str
    taught: Taught

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.taught.kind}-{self.taught.seed}-{self.method}"

    @property
    def recipe(self) -> Path:
        """The file."""
        return CONFIGS / self._how[0]

    @property
    def overrides(self) -> list[str]:
        """What it changes there."""
        folder = f"data.concepts.0.folder=tinyworld:{self.taught.kind}/{self.taught.seed}"
        changes = [change.format(**self._words) if change in OTHER_WORDS else change for change in self._how[1:]]
        return [folder, *ALIKE, *self._report, *changes]

    @property
    def _report(self) -> list[str]:
        if not METHODS[self.method].asks:
            return ["report.prompts=[]"]
        asked = self.taught.questions()
        prompts = [*(prompt for prompt, _ in asked.scenes), *asked.plain]
        return [f"report.prompts={json.dumps(prompts)}", f"report.per_prompt={asked.per_scene}"]

    @property
    def _how(self) -> tuple[str, ...]:
        how = getattr(METHODS[self.method], self.taught.kind)
        if how is None:
            raise UserError(f"methods: {self.method!r} is not for a {self.taught.kind}")
        return tuple(how)

    @property
    def _words(self) -> dict[str, str]:
        """The subject's token and a noun that is or is not its class."""
        one, noun = tinyworld.subject(self.taught.seed), METHODS[self.method].noun
        shapes = tinyworld.FACTORS["shape"]
        other = shapes[(shapes.index(one.shape) + 1) % len(shapes)]
        said = {"right": one.shape, "wrong": other, "none": ""}[noun]
        return {
            "article": "an" if one.token[0] in "aeio" else "a",
            "token": one.token,
            "noun": f" {said}" if said else "",
            "class_prompt": tinyworld.compose({"shape": said} if said else {}),
        }


@dataclass(frozen=True)
class Result:
    """What came out of a trial; ``failure`` says why there is no outcome.

    Attributes:
        size: bytes of the exported files, in one layout.
        trained: numbers that were trained.
    """

    trial: Trial
    outcome: Outcome | None = None
    size: int = 0
    trained: int = 0
    failure: str = ""


def trials_of(methods: Sequence[str], subjects: Sequence[int], styles: Sequence[int]) -> list[Trial]:
    """Every method on everything that it is for, target by target, so that a study stopped early has whole ones.

    Raises:
        UserError: a method is unknown.
    """
    for name in methods:
        if name not in METHODS:
            raise UserError(f"methods: {name!r} is unknown{nearest(name, METHODS)}")
    targets = [*(Taught("subject", seed) for seed in subjects), *(Taught("style", seed) for seed in styles)]
    return [
        Trial(name, taught) for taught in targets for name in methods if getattr(METHODS[name], taught.kind) is not None
    ]


def run(trial: Trial, out: Path, overrides: Sequence[str] = ()) -> Result:
    """Run one trial where it has not been, and say how it ended."""
    try:
        changes = [f"output={out / trial.name}", *trial.overrides, *overrides]
        layout = FORMATS[read_recipe(trial.recipe, changes).adapter.kind][0]
        changes += [f"export.formats=[{layout}]", "export.for=null"]
        command = [sys.executable, "-m", "finetune", "train", str(trial.recipe), *changes]
        outcome = trials.run(trial.name, command, out)
    except (GuardError, UserError) as error:
        print(f"{trial.name}: FAILED: {error}", flush=True)
        return Result(trial, failure=str(error))
    before, after = outcome.evaluation.before, outcome.evaluation.after
    print(
        f"{trial.name}: fidelity {before.normalised:.2f} -> {after.normalised:.2f}, accuracy {before.accuracy:.2f} -> "
        f"{after.accuracy:.2f}, PRES* {before.pres:.2f} -> {after.pres:.2f}, {outcome.seconds:.0f} s",
        flush=True,
    )
    folder = out / trial.name
    return Result(trial, outcome, size_of(folder / "adapters"), trained_in(folder / "checkpoints"))


def size_of(adapters: Path) -> int:
    """Bytes of what has to be handed over."""
    return sum(file.stat().st_size for file in adapters.rglob("*") if file.is_file())


def trained_in(checkpoints: Path) -> int:
    """How many numbers a run trained, from the head of its newest checkpoint; 0 for one that trains none."""
    found = sorted(checkpoints.glob("step-*/state.safetensors"))
    if not found:
        return 0
    with found[-1].open("rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    shapes = [entry["shape"] for name, entry in head.items() if name.startswith("trained/")]
    return sum(_product(shape) for shape in shapes)


def _product(shape: Sequence[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 when all runs end well and all claims hold, 4 when not, 2 for a bad argument."""
    options = _options(arguments)
    try:
        wanted = trials_of(options.methods, options.subjects, options.styles)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    work = partial(run, out=options.out, overrides=options.overrides)
    found = list(trials.side_by_side(work, wanted, options.jobs))
    said = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "finetune.evaluation.methods", *said])
    claims = comparison.claims(found)
    where = {"machine": machine(), "versions": versions(), "study": {"command": command}}
    record = {**where, "runs": [asdict(one) for one in found], "claims": [asdict(one) for one in claims]}
    files.write_json(options.out / "results.json", record)
    titles = {name: method.title for name, method in METHODS.items()}
    text = comparison.section(found, titles, claims, where)
    findings.write_section(options.page, text, comparison.BEGIN, comparison.END, comparison.HEADING)
    for claim in claims:
        print(claim)
    failed = [one.trial.name for one in found if one.failure]
    if failed:
        print(f"{len(failed)} of {len(found)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return 0 if all(claim.holds for claim in claims) and not failed else 4


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m finetune.evaluation.methods", description=summary)
    parser.add_argument("--subjects", type=numbers, default=[101, 102, 103, 104, 105], help="seeds, with commas")
    parser.add_argument("--styles", type=numbers, default=[201, 202, 203], help="seeds, with commas")
    parser.add_argument("--methods", type=words, default=list(METHODS), help=", ".join(METHODS))
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"), help="folder of the runs and results.json")
    parser.add_argument("--page", type=Path, default=Path("docs/methods.md"), help="page whose section is rewritten")
    parser.add_argument("overrides", nargs="*", help="more changes to every run: train.steps=300")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
