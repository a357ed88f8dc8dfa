"""What follows the last step: export, verify, look at the result, report."""

from __future__ import annotations

import io
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from finetune import evaluation
from finetune.adapter import Weights
from finetune.config import Recipe, lock
from finetune.config.schema import ModelConfig
from finetune.data import Batches, Concept, Picture, wording
from finetune.data.places import Place
from finetune.distributed import Processes
from finetune.evaluation import Answers, Captioned, Command, Evaluation, ExportedFile, Questions, ReportData, Taught
from finetune.evaluation.machine import machine, versions
from finetune.export import Verification, export, identify, pieces, usage, verify
from finetune.export.cover import put_cover
from finetune.export.sample import adapted
from finetune.families import EMBEDDED, families, load_family, model_folder
from finetune.family import ModelFamily
from finetune.sampling import draw
from finetune.train import RunFolder, Trainer

if TYPE_CHECKING:
    from PIL import Image

_SHARED_SCENES = 3  # new scenes of each concept, where there are several
_SHOWN = 24  # pictures of a kind that the report shows at most


@dataclass(frozen=True)
class Shown:
    """What a run was given, as far as the report shows it.

    Attributes:
        concepts: the pictures.
        classes: class images.
        prompts: of pictures that were drawn on the way.
        notes: what should not pass unseen.
        verdict: says from the answers before and after what came of it, where the embedded world's judge has no say.
    """

    concepts: Sequence[Concept]
    classes: Sequence[Picture] = ()
    prompts: Sequence[str] = ()
    notes: Sequence[str] = ()
    verdict: Callable[[Answers, Answers], str] | None = None


def finish(trainer: Trainer, family: ModelFamily, batches: Batches) -> None:
    """Write what was trained, load it again, compare, and show it. Every process must call it.

    Raises:
        GuardError: nothing was learned, or a written file does not read back as what was trained.
    """
    recipe, processes, folder = trainer.recipe, trainer.processes, trainer.folder
    pictures = sorted(folder.samples.glob("step-*/0-0.png"))
    cover = pictures[-1] if pictures else None
    verified = write(trainer.finish(), family, _named(recipe, batches.concepts), processes, folder.adapters, cover)
    if recipe.report.enabled:
        family.release(*list(family.networks))  # the base and the exported file are loaded anew
        prompts = recipe.samples.prompts or batches.example_prompts
        shown = Shown(batches.concepts, batches.classes, prompts, batches.notes)
        report(recipe, processes, shown, folder, verified)


def _named(recipe: Recipe, concepts: Sequence[Concept]) -> Recipe:
    """``recipe`` with the words that pictures bring along, as those of the embedded world do: files tell them."""
    words = ("trigger", "prompt", "class_prompt")
    own = [
        config.model_copy(update={key: getattr(concept.config, key) for key in words})
        for config, concept in zip(recipe.data.concepts, concepts, strict=True)
    ]
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"concepts": own})})


def write(
    weights: Sequence[Weights],
    family: ModelFamily,
    recipe: Recipe,
    processes: Processes,
    folder: Path,
    cover: Path | None = None,
) -> list[Verification]:
    """Export into ``folder``, load every file again and compare. Every process must call it.

    Args:
        cover: a picture of what was learned, which adapters carry with them.

    Raises:
        GuardError: nothing was learned, or a written file does not read back as what was trained.
    """

    def written(one: Weights) -> list[Verification]:
        paths = export(one, family, recipe, folder)
        if cover:
            for path in paths:
                put_cover(path, _open(cover))
        return [verify(path, weights=one) for path in paths]

    verified = processes.on_main(
        lambda: [found for one in weights for found in written(one)], "exporting and verifying"
    )
    for one in verified:
        processes.say(str(one))
        one.require()
    return verified


def report(
    recipe: Recipe, processes: Processes, shown: Shown, folder: RunFolder, verified: Sequence[Verification]
) -> None:
    """Ask the untouched model and the exported file the same questions, and write ``report.html``."""
    concepts, taught = shown.concepts, _taught(recipe)
    asked = _questions(recipe, concepts, taught)
    processes.say(f"drawing {2 * asked.pictures} pictures for the report")
    base = load_family(recipe.model, device=processes.device)
    before = _ask(asked, base, recipe, processes)
    base.release(*list(base.networks))
    file = verified[0].path
    source = None if identify(file).whole else recipe.model.path
    chunks = recipe.model.prompt_chunks
    trained = adapted(folder.adapters, source, device=processes.device, prompt_chunks=chunks, held=recipe.model)
    after = _ask(asked, trained, recipe, processes)
    if not processes.is_main:
        return
    judged = taught[0].evaluate(asked, before, after) if len(taught) == 1 and taught[0] else None
    if judged:
        judged.write(folder.path)
    verdict = shown.verdict(before, after) if shown.verdict else None
    metrics = evaluation.read_metrics(folder.metrics)
    data = ReportData(
        title=_title(concepts, recipe),
        kind=_kind(recipe),
        triggers=[concept.config.trigger for concept in concepts if concept.config.trigger],
        verdict=verdict,
        subject=[Captioned(_open(picture.path), picture.captions[0]) for picture in _pictures(concepts)],
        class_images=[Captioned(_open(picture.path), picture.captions[0]) for picture in shown.classes[:_SHOWN]],
        class_image_count=len(shown.classes),
        evaluation=judged,
        metrics=metrics,
        snapshots=_snapshots(folder.samples, shown.prompts),
        exported=[_exported(one, folder.path) for one in verified],
        commands=_commands(recipe, families()[base.name].pipelines[0], verified, asked),
        recipe=lock(recipe),
        facts={**machine(), **versions(), "processes": processes.describe()},
        notes=shown.notes,
        seconds=time.time() - psutil.Process().create_time(),
        training_seconds=sum(row.get("seconds", 0.0) for row in metrics),
        peak_memory=_peak_memory(),
        **evaluation.shots(asked, before, after),
    )
    evaluation.write_sheet(folder.path / "before-after.png", data)
    page = evaluation.write_report(folder.path, data)
    if verdict or judged:
        processes.say(verdict or _figures(judged))
    processes.say(f"report: {page}")


def _taught(recipe: Recipe) -> list[Taught | None]:
    """What each concept is of the embedded world; all None for another model."""
    shipped = recipe.model.path in EMBEDDED
    return [Taught.of(concept) if shipped else None for concept in recipe.data.concepts]


def _questions(recipe: Recipe, concepts: Sequence[Concept], taught: Sequence[Taught | None]) -> Questions:
    """Of one concept of the embedded world, its own; else the report's prompts, and what each concept brings."""
    triggers = [concept.config.trigger for concept in concepts]
    asked = recipe.report.prompts
    if len(taught) == 1 and taught[0] and not asked:
        return taught[0].questions(concepts[0].config)
    scenes: list[tuple[str, Mapping[str, str]]] = [(prompt, {}) for prompt in asked]
    for one, concept in zip(taught, concepts, strict=True):
        scenes += one.questions(concept.config, _SHARED_SCENES).scenes if one and not asked else ()
    own = [wording.plain(concept.pictures[0].captions[0], recipe.data.wording) for concept in concepts]
    prompts = [concept.config.prompt or text or asked[0] for concept, text in zip(concepts, own, strict=True)]
    scenes += [(prompt, {}) for prompt in prompts[1:]]
    with_word = [scene for scene in scenes if set(scene[0].split()) & set(triggers)] or scenes
    classes = list(dict.fromkeys(concept.config.class_prompt for concept in concepts if concept.config.class_prompt))
    count = recipe.report.per_prompt
    return Questions(
        scenes=tuple(with_word),
        instance=prompts[0],
        class_prompt=classes[0] if classes else None,
        per_scene=count,
        per_instance=count,
        per_class=count,
        plain=(*classes[1:], *(scene[0] for scene in scenes if scene not in with_word)),
    )


def _pictures(concepts: Sequence[Concept]) -> list[Picture]:
    """Of all concepts as many, and no more than the report shows."""
    each = max(1, _SHOWN // len(concepts))
    return [picture for concept in concepts for picture in concept.pictures[:each]]


def _ask(asked: Questions, family: ModelFamily, recipe: Recipe, processes: Processes) -> Answers:
    def draw_each(prompts: Sequence[str], per_prompt: int) -> list[Image.Image]:
        side = recipe.data.resolution
        return draw(family, prompts, per_prompt, recipe.report.sampler, recipe.seed, processes, side)

    return evaluation.ask(asked, draw_each)


def _title(concepts: Sequence[Concept], recipe: Recipe) -> str:
    return ", ".join(filter(None, map(_name, concepts))) or Path(recipe.output).name


def _name(concept: Concept) -> str:
    """What a concept is called: its prompt from the trigger on, or as its captions speak of it."""
    trigger = concept.config.trigger or ""
    words = (concept.config.prompt or "").split()
    if trigger in words:
        return " ".join(words[words.index(trigger) :])
    spoken = all(f"style of {trigger}" in text for picture in concept.pictures for text in picture.captions)
    return f"style {trigger}" if trigger and spoken else trigger


def _kind(recipe: Recipe) -> str:
    names = {"lora": "LoRA", "dreambooth": "DreamBooth"}
    priors = {"images": "prior preservation by class images", "model": "prior preservation by the untouched model"}
    prior = priors.get(recipe.prior.kind, "no prior preservation")
    name = names.get(recipe.recipe, recipe.recipe.replace("_", " ").capitalize())
    parts = [name, recipe.adapter.summary, *([] if recipe.adapter.kind == "aesthetic" else [prior])]
    return ", ".join(parts)


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


def _commands(recipe: Recipe, kind: str, verified: Sequence[Verification], asked: Questions) -> list[Command]:
    path = verified[0].path
    prompt = asked.scenes[0][0] if asked.scenes else asked.instance
    used = pieces(path.parent)
    model = str(used[0].path) if used[0].whole else recipe.model.path
    code = "\n".join([_pipeline(model, kind, recipe), *(usage.loading(one) for one in used if not one.whole)])
    what = path if len(used) == 1 else path.parent
    chunks = recipe.model.prompt_chunks
    long = f" --prompt-chunks {chunks}" if used[0].whole and chunks > 1 else ""
    return [
        Command("draw with it", f'finetune sample {what} --prompt "{prompt}" --seed 0{long}'),
        Command(
            "in diffusers",
            f"{usage.imports(code)}\n{code}\npipeline({prompt!r}).images[0].save('out.png')",
        ),
        Command("check it again", f"finetune verify {path}"),
    ]


def _pipeline(model: str, kind: str, recipe: Recipe) -> str:
    """How diffusers loads a model: a single file with the settings of a model that it is like.

    Args:
        kind: of its pipelines.
    """
    if not Path(model).is_file():
        return usage.pipeline(model)
    base = recipe.model.path
    like = recipe.model.like or ("" if Path(base).is_file() else base)
    return usage.single_file(repr(model), kind, str(model_folder(ModelConfig(path=like))) if like in EMBEDDED else like)


def _figures(one: Evaluation) -> str:
    before, after = one.before, one.after
    ends = "0: others of its class, 1: real pictures" if one.kind == "subject" else "0: plain, 1: renders in the style"
    return (
        f"{one.kind} fidelity {before.normalised:.2f} -> {after.normalised:.2f} ({ends}), "
        f"prompt accuracy {before.accuracy:.2f} -> {after.accuracy:.2f}, "
        f"PRES* {before.pres:.2f} -> {after.pres:.2f}, DIV* {before.div:.2f} -> {after.div:.2f}"
    )


def _open(place: Place) -> Image.Image:
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(place.read_bytes())) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")


def _peak_memory() -> int:
    """Bytes that this process held at its largest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
