"""From a recipe to its plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from finetune.adapters import attach
from finetune.aesthetic import require_space
from finetune.config import Recipe, read_recipe
from finetune.config.adapters import (
    AdapterConfig,
    AestheticConfig,
    EmbeddingConfig,
    FullConfig,
    HypernetworkConfig,
    LoraConfig,
    PivotalConfig,
    new_words,
)
from finetune.config.objective import SnrWeighting
from finetune.config.profiles import capacity, filled
from finetune.config.schema import ImagesPrior, ModelPrior
from finetune.config.summary import summary
from finetune.data import sources
from finetune.data.batches import Batches
from finetune.data.encode import Latents, Prompts
from finetune.data.entries import draws_per_epoch, shapes
from finetune.data.folders import picture_files
from finetune.data.preparation import check_fit
from finetune.data.prior import class_prompts, drawn_for, foreseen
from finetune.data.processes import Alone
from finetune.errors import UserError
from finetune.export.kinds import aesthetic, embedding, full, hypernetwork, lora, lycoris, pivotal
from finetune.export.read import MODEL
from finetune.families import load_family, model_folder
from finetune.families.tokens import check_trigger
from finetune.family import ExportNames, ModelFamily
from finetune.plan.advice import advise
from finetune.plan.contents import Arithmetic, Cache, ClassImages, Concept, Output, Plan
from finetune.plan.memory import adaptation, estimate
from finetune.plan.profiles import fits
from finetune.plan.skeleton import fill
from finetune.train.checkpoint import newest
from finetune.train.run import RunFolder, decisive


def plan(
    recipe: Recipe, processes: int = 1, profiles: bool = False, room: int | None = None, file: str = "RECIPE.yaml"
) -> Plan:
    """What ``recipe`` would do on ``processes`` processes.

    Args:
        room: bytes that a process may take on its GPU; what the recipe's profile says where it is None.
        file: where the recipe is from, for the command that launches it.
        profiles: say also what it would need with each profile, which takes as long for each.

    Raises:
        UserError: everything that is wrong with the pictures, or doubtful of them with ``data.strict``, or a model,
            resolution or layer pattern that does not fit. Training would find the same.
    """
    family = load_family(recipe.model, recipe.objective)
    check_fit(recipe, family)
    found = sources.scan(recipe.data, captioned=recipe.adapter.kind != "aesthetic", words=new_words(recipe.adapter))
    networks = fill(family, model_folder(recipe.model))
    if recipe.adapter.kind == "aesthetic":
        return _untrained(recipe, family, found, networks)
    adapter = attach(recipe.adapter, family, recipe.seed)
    trainable = {group.name: sum(one.numel() for one in group.parameters.values()) for group in adapter.groups()}
    latents = Latents(family, recipe.data)
    prompts = None if recipe.adapter.trains_text else Prompts(family, recipe.data)
    classes = foreseen(recipe, found)
    batches = Batches(recipe, family, found, classes, latents, prompts, Alone(world=processes))
    sources.refuse_doubts(recipe.data, batches.doubts)
    class_images = tuple(_class_images(recipe, family, found))
    longest = max(batches.final_captions, key=lambda text: family.prompt_length(text, batches.words))
    memory = estimate(recipe, family, adapter, longest)
    if room is None and recipe.profile:
        room = capacity(recipe.profile)
    return Plan(
        summary=summary(recipe),
        model=recipe.model.path,
        family=family.name,
        networks=networks,
        trainable=trainable,
        concepts=tuple(map(_concept, found)),
        shapes=tuple(shapes(batches.subjects)),
        arithmetic=_arithmetic(recipe, found, processes),
        class_images=class_images,
        caches=tuple(_caches(recipe, family, batches)),
        memory=memory,
        output=_output(recipe, family.export_names),
        notes=tuple(dict.fromkeys([*batches.notes, *_triggers(family, found), *_notes(recipe)])),
        profile=filled(recipe),
        fits=tuple(fits(recipe, memory, longest)) if profiles else (),
        advice=advise(recipe, family, adapter, memory, processes, room, file),
    )


def _untrained(recipe: Recipe, family: ModelFamily, found: Sequence[sources.Concept], networks: dict[str, int]) -> Plan:
    """Of a recipe that looks at pictures and takes no steps."""
    require_space(family)
    notes = tuple(note for concept in found for note in concept.notes)
    sources.refuse_doubts(recipe.data, notes)
    return Plan(
        summary=summary(recipe),
        model=recipe.model.path,
        family=family.name,
        networks=networks,
        trainable={},
        concepts=tuple(map(_concept, found)),
        shapes=(),
        arithmetic=None,
        class_images=(),
        caches=(),
        memory=adaptation(networks, family.text_encoders),
        output=_output(recipe, family.export_names),
        notes=notes,
    )


def _concept(found: sources.Concept) -> Concept:
    pictures, config = found.pictures, found.config
    smallest, largest = (
        end((p.facts for p in pictures), key=lambda facts: facts.width * facts.height) for end in (min, max)
    )
    told = Counter("the prompt" if p.captions == (config.prompt,) else "their own" for p in pictures)
    return Concept(
        source=config.source,
        pictures=len(pictures),
        repeats=config.repeats,
        captions=dict(told),
        example=pictures[0].captions[0],
        smallest=(smallest.width, smallest.height),
        largest=(largest.width, largest.height),
        masked=sum(picture.mask is not None for picture in pictures),
        bytes=found.bytes,
        trigger=config.trigger,
        class_prompt=config.class_prompt,
    )


def _arithmetic(recipe: Recipe, found: Sequence[sources.Concept], processes: int) -> Arithmetic:
    train, prior = recipe.train, recipe.prior
    draws = train.batch_size * train.gradient_accumulation_steps * processes
    mixed = isinstance(prior, ImagesPrior) and prior.layout == "mixed"
    subjects = draws / 2 if mixed else draws
    per_epoch = draws_per_epoch(recipe, found)
    return Arithmetic(
        steps=train.total_steps,
        processes=processes,
        batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        subject_pictures=subjects,
        class_pictures=subjects if isinstance(prior, ImagesPrior) else 0,
        draws_per_epoch=per_epoch,
        epochs=train.total_steps * subjects / per_epoch,
    )


def _class_images(recipe: Recipe, family: ModelFamily, found: Sequence[sources.Concept]) -> Iterator[ClassImages]:
    prior = recipe.prior
    if not isinstance(prior, ImagesPrior):
        return
    own = Path(prior.folder) if prior.folder is not None else None
    pictures = picture_files(own, "prior.folder")[0] if own is not None and own.is_dir() else []
    for prompt in class_prompts(found):
        folder = own if own is not None and pictures else drawn_for(recipe, prior, family, prompt).folder
        present = len(pictures) or sum(1 for _ in folder.glob("*.png"))
        yield ClassImages(prompt=prompt, folder=str(folder), needed=prior.count, present=min(present, prior.count))


def _caches(recipe: Recipe, family: ModelFamily, batches: Batches) -> Iterator[Cache]:
    cache = recipe.data.cache
    flips = (False, True) if recipe.data.flip else (False,)
    if cache.latents:
        store = batches.latents.store
        cell = 2 * family.latent_channels * batches.latents.dtype.itemsize  # mean and logvar
        key = batches.latents.key
        areas = {key(one.picture, one.crop, flip): one.crop.target.area for one in batches.entries for flip in flips}
        yield Cache(
            kind="pictures",
            folder=str(store.folder),
            entries=len(areas),
            present=sum(name in store for name in areas),
            bytes=sum(areas.values()) // family.latent_scale**2 * cell,
        )
    if cache.text and batches.prompts is not None:
        captions = batches.final_captions
        one = family.encode_prompt([""])  # on skeletons: shapes alone
        size = sum(tensor.nbytes for tensor in one.tensors.values()) / one.tokens.shape[1]  # of a token
        yield Cache(
            kind="captions",
            folder=str(batches.prompts.store.folder),
            entries=len(captions),
            present=sum(batches.prompts.key(text) in batches.prompts.store for text in captions),
            bytes=round(size * sum(family.prompt_length(text, batches.words) for text in captions)),
        )


def _output(recipe: Recipe, names: Mapping[str, ExportNames]) -> Output:
    folder = RunFolder(Path(recipe.output))
    adapters = folder.adapters.name
    written = _written(recipe, recipe.adapter, names)
    steps = [folder.metrics.name, f"{folder.checkpoints.name}/ ({recipe.checkpoint.keep} kept)"]
    if isinstance(recipe.adapter, AestheticConfig):
        steps = []
    files = [folder.lock.name, *steps[:1], *(f"{adapters}/{name}" for name in written), *steps[1:]]
    files += [f"{folder.samples.name}/"] if recipe.samples.every else []
    files += [folder.report.name] if recipe.report.enabled else []
    return Output(folder=str(folder.path), state=_state(folder, recipe), files=tuple(files))


def _written(recipe: Recipe, adapter: AdapterConfig, names: Mapping[str, ExportNames]) -> list[str]:
    """The files that hold weights, of each of an adapter's parts, for a family of these names."""
    match adapter:
        case PivotalConfig():
            parts = [*_written(recipe, adapter.weights, names), *_written(recipe, adapter.embedding, names)]
            return [*parts, *pivotal.file_names(recipe, names).values()]
        case AestheticConfig():
            baked = lora.file_names(recipe, names).values() if adapter.bake_prompts else ()
            return [*aesthetic.file_names(recipe).values(), *(f"baked/{name}" for name in baked)]
        case FullConfig():
            return [f"{name}/" if name == MODEL else name for name in full.file_names(recipe).values()]
        case EmbeddingConfig():
            return embedding.file_names(recipe, names)
        case HypernetworkConfig():
            return list(hypernetwork.file_names(recipe).values())
        case LoraConfig():
            return list(lora.file_names(recipe, names).values())
    return list(lycoris.file_names(recipe, adapter.kind, names).values())


def _state(folder: RunFolder, recipe: Recipe) -> str:
    if not folder.lock.is_file():
        return "new" if not folder.path.exists() else "there already, without a run"
    try:
        same = decisive(read_recipe(folder.lock)) == decisive(recipe)
    except UserError:
        same = False
    if not same:
        return "holds another run, and training will refuse: choose another output"
    last = newest(folder.checkpoints, say=lambda _: None)
    return f"holds this run, which continues from {last.name}" if last else "holds this run, which begins again"


def _triggers(family: ModelFamily, found: Sequence[sources.Concept]) -> Iterator[str]:
    for concept in found:
        if concept.config.trigger:
            yield from check_trigger(family, concept.config.trigger, concept.config.class_prompt)


def _notes(recipe: Recipe) -> Iterator[str]:
    train, prior = recipe.train, recipe.prior
    if recipe.adapter.trains_text and recipe.data.cache.text:
        yield "captions are not cached, because the text encoder trains"
    if isinstance(prior, ImagesPrior | ModelPrior) and prior.weight == 0:
        yield f"prior {prior.kind!r} has weight 0: it costs as much as ever and preserves nothing"
    weighting = recipe.objective.weighting
    if recipe.objective.zero_terminal_snr and isinstance(weighting, SnrWeighting) and not weighting.least:
        yield f"weighting {weighting.kind!r} gives v-prediction's last timestep no weight: `least` keeps it learning"
    if train.schedule.warmup_steps == train.steps:
        yield "the warm-up lasts until the end: the learning rate is reached in the last step"
    if recipe.samples.every and recipe.samples.every > train.steps:
        yield "samples.every is larger than train.steps: no samples are drawn on the way"
