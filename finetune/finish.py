"""What follows the last step: export, verify, look at the result, report."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from finetune import evaluation
from finetune.config import Recipe, lock
from finetune.data import Batches, Concept
from finetune.distributed import Processes
from finetune.evaluation import Answers, Captioned, Command, Evaluation, ExportedFile, Questions, ReportData
from finetune.evaluation.machine import machine, versions
from finetune.export import Verification, export, identify, verify
from finetune.export.sample import adapted
from finetune.families import load_family
from finetune.family import ModelFamily
from finetune.sampling import draw
from finetune.train import Trainer

if TYPE_CHECKING:
    from PIL import Image

_EMBEDDED = re.compile(r"tinyworld:subject/(\d+)")
_SHOWN = 24  # pictures of a kind that the report shows at most


def finish(trainer: Trainer, family: ModelFamily, batches: Batches) -> None:
    """Write what was trained, load it again, compare, and show it. Every process must call it.

    Raises:
        GuardError: nothing was learned, or a written file does not read back as what was trained.
    """
    recipe, processes, folder = trainer.recipe, trainer.processes, trainer.folder
    weights = trainer.finish()
    verified = processes.on_main(
        lambda: [verify(path, weights=weights) for path in export(weights, family, recipe, folder.adapters)]
    )
    for one in verified:
        processes.say(str(one))
        one.require()
    if recipe.report.enabled:
        family.release(*list(family.networks))  # the base and the exported file are loaded anew
        report(recipe, processes, batches, trainer, verified)


def report(
    recipe: Recipe, processes: Processes, batches: Batches, trainer: Trainer, verified: Sequence[Verification]
) -> None:
    """Ask the untouched model and the exported file the same questions, and write ``report.html``."""
    concept, folder = batches.concepts[0], trainer.folder
    subject = _embedded_subject(recipe)
    asked = _questions(recipe, concept, subject)
    processes.say(f"drawing {2 * _count(asked)} pictures for the report")
    base = load_family(recipe.model, device=processes.device)
    before = _ask(asked, base, recipe, processes)
    base.release(*list(base.networks))
    file = verified[0].path
    source = None if identify(file).kind == "full" else recipe.model.path
    after = _ask(asked, adapted(file, source, device=processes.device), recipe, processes)
    if not processes.is_main:
        return
    judged = None if subject is None else evaluation.evaluate(subject, asked, before, after)
    if judged:
        judged.write(folder.path)
    metrics = evaluation.read_metrics(folder.metrics)
    data = ReportData(
        title=_title(concept, recipe),
        kind=_kind(recipe),
        trigger=concept.config.trigger or "",
        subject=[Captioned(_open(picture.path), picture.captions[0]) for picture in concept.pictures[:_SHOWN]],
        class_images=[Captioned(_open(picture.path), picture.captions[0]) for picture in batches.classes[:_SHOWN]],
        class_image_count=len(batches.classes),
        evaluation=judged,
        metrics=metrics,
        snapshots=_snapshots(folder.samples, recipe.samples.prompts or batches.example_prompts),
        exported=[_exported(one, folder.path) for one in verified],
        commands=_commands(recipe, verified, asked),
        recipe=lock(recipe),
        facts={**machine(), **versions(), "processes": processes.describe()},
        notes=batches.notes,
        seconds=time.time() - psutil.Process().create_time(),
        training_seconds=sum(row.get("seconds", 0.0) for row in metrics),
        peak_memory=_peak_memory(),
        **evaluation.shots(asked, before, after),
    )
    evaluation.write_sheet(folder.path / "before-after.png", data)
    page = evaluation.write_report(folder.path, data)
    if judged:
        processes.say(_figures(judged))
    processes.say(f"report: {page}")


def _embedded_subject(recipe: Recipe) -> int | None:
    """The embedded world's subject that is taught, if it is one of them and nothing else."""
    found = [_EMBEDDED.fullmatch(concept.folder) for concept in recipe.data.concepts]
    shipped = recipe.model.path == "tinyworld"
    return int(found[0][1]) if shipped and len(found) == 1 and found[0] else None


def _questions(recipe: Recipe, concept: Concept, subject: int | None) -> Questions:
    if subject is not None and not recipe.report.prompts:
        return evaluation.tinyworld_questions(subject)
    taught = concept.config.prompt or concept.pictures[0].captions[0]
    count = recipe.report.per_prompt
    return Questions(
        scenes=tuple((prompt, {}) for prompt in recipe.report.prompts),
        instance=taught,
        class_prompt=concept.config.class_prompt,
        per_scene=count,
        per_instance=count,
        per_class=count,
    )


def _ask(asked: Questions, family: ModelFamily, recipe: Recipe, processes: Processes) -> Answers:
    def draw_each(prompts: Sequence[str], per_prompt: int) -> list[Image.Image]:
        side = recipe.data.resolution
        return draw(family, prompts, per_prompt, recipe.report.sampler, recipe.seed, processes, side)

    return evaluation.ask(asked, draw_each)


def _count(asked: Questions) -> int:
    of_class = asked.per_class if asked.class_prompt else 0
    return len(asked.scenes) * asked.per_scene + asked.per_instance + of_class


def _title(concept: Concept, recipe: Recipe) -> str:
    if concept.config.trigger and concept.config.prompt:
        words = concept.config.prompt.split()
        if concept.config.trigger in words:
            return " ".join(words[words.index(concept.config.trigger) :])
    return Path(recipe.output).name


def _kind(recipe: Recipe) -> str:
    adapter = recipe.adapter
    trained = f"LoRA of rank {adapter.rank}" if adapter.kind == "lora" else f"whole weights ({adapter.select})"
    names = {"dreambooth": "DreamBooth", "lora": "LoRA", "full": "Full fine-tuning"}
    priors = {"images": "prior preservation by class images", "model": "prior preservation by the untouched model"}
    prior = priors.get(recipe.prior.kind, "no prior preservation")
    return f"{names[recipe.recipe]}, {trained}, {prior}"


def _snapshots(folder: Path, prompts: Sequence[str]) -> list[evaluation.Snapshot]:
    """The previews: ``step-000200/<prompt>-<picture>.png``."""
    found = []
    for step in sorted(folder.glob("step-*")):
        for number, prompt in enumerate(prompts):
            pictures = [_open(path) for path in sorted(step.glob(f"{number}-*.png"))]
            if pictures:
                found.append(evaluation.Snapshot(int(step.name.removeprefix("step-")), prompt, pictures))
    return found


def _exported(one: Verification, run: Path) -> ExportedFile:
    found = identify(one.path)
    files = [one.path] if one.path.is_file() else [file for file in one.path.rglob("*") if file.is_file()]
    checks = [evaluation.Check(check.name, check.passed, check.detail) for check in one.checks]
    size = sum(file.stat().st_size for file in files)
    return ExportedFile(str(one.path.relative_to(run)), found.layout, size, checks)


def _commands(recipe: Recipe, verified: Sequence[Verification], asked: Questions) -> list[Command]:
    path = verified[0].path
    prompt = asked.scenes[0][0] if asked.scenes else asked.instance
    base = recipe.model.path
    if base == "tinyworld":
        loading = "from finetune.tinyworld import BASE\n\npipeline = StableDiffusionPipeline.from_pretrained(BASE)"
    else:
        loading = f"\npipeline = StableDiffusionPipeline.from_pretrained({base!r})"
    if recipe.adapter.kind == "full":
        loading = f"\npipeline = StableDiffusionPipeline.from_pretrained({str(path)!r})"
    else:
        loading += f"\npipeline.load_lora_weights({str(path)!r})"
    return [
        Command("draw with it", f'finetune sample {path} --prompt "{prompt}" --seed 0'),
        Command(
            "in diffusers",
            f"from diffusers import StableDiffusionPipeline\n{loading}\npipeline({prompt!r}).images[0].save('out.png')",
        ),
        Command("check it again", f"finetune verify {path}"),
    ]


def _figures(one: Evaluation) -> str:
    before, after = one.before, one.after
    return (
        f"subject fidelity {before.normalised:.2f} -> {after.normalised:.2f} "
        "(0: others of its class, 1: real pictures), "
        f"prompt accuracy {before.accuracy:.2f} -> {after.accuracy:.2f}, "
        f"PRES* {before.pres:.2f} -> {after.pres:.2f}, DIV* {before.div:.2f} -> {after.div:.2f}"
    )


def _open(path: Path) -> Image.Image:
    from PIL import Image, ImageOps

    with Image.open(path) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")


def _peak_memory() -> int:
    """Bytes that this process held at its largest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
