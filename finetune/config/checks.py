"""What single keys cannot say: settings that contradict each other. Needs no model, no torch and no pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from finetune.config.schema import FullConfig, ImagesPrior, LoraConfig, NoPrior, Recipe

EMBEDDED = "tinyworld:"  # folders of the embedded world bring their own prompts and trigger


class Contradiction(NamedTuple):
    """Which key is wrong and why, as the rest of a sentence that begins with the key."""

    path: tuple[str | int, ...]
    text: str


def contradictions(recipe: Recipe) -> Iterator[Contradiction]:
    """Everything in ``recipe`` that cannot be meant."""
    yield from _concepts(recipe)
    yield from _prior(recipe)
    yield from _adapter(recipe)
    yield from _train(recipe)
    yield from _outputs(recipe)


def _concepts(recipe: Recipe) -> Iterator[Contradiction]:
    for index, concept in enumerate(recipe.data.concepts):
        at = ("data", "concepts", index)
        if concept.captions == "prompt" and concept.prompt is None:
            yield Contradiction((*at, "captions"), "is 'prompt', but the concept has no prompt")
        if concept.trigger and concept.prompt and not _holds(concept.prompt, concept.trigger):
            yield Contradiction(
                (*at, "prompt"), f"must contain the trigger {concept.trigger!r}; it is {concept.prompt!r}"
            )
        if concept.trigger and concept.class_prompt and _holds(concept.class_prompt, concept.trigger):
            yield Contradiction(
                (*at, "class_prompt"),
                f"must not contain the trigger {concept.trigger!r}: it names the class, not the subject; "
                f"{_without(concept.class_prompt, concept.trigger)!r} would do",
            )
        if recipe.recipe != "dreambooth" or concept.folder.startswith(EMBEDDED):
            continue
        if concept.trigger is None:
            yield Contradiction((*at, "trigger"), "is missing: DreamBooth ties the subject to a rare word")
        if concept.prompt is None and concept.captions in ("auto", "prompt"):
            yield Contradiction(
                (*at, "prompt"), "is missing: DreamBooth captions its pictures with it, 'a photo of zib star'"
            )


def _prior(recipe: Recipe) -> Iterator[Contradiction]:
    if isinstance(recipe.prior, NoPrior):
        return
    if recipe.recipe != "dreambooth":
        yield Contradiction(("prior", "kind"), f"must be none: the recipe {recipe.recipe!r} preserves no prior")
        return
    for index, concept in enumerate(recipe.data.concepts):
        if concept.class_prompt is None and not concept.folder.startswith(EMBEDDED):
            yield Contradiction(
                ("data", "concepts", index, "class_prompt"),
                f"is missing: prior {recipe.prior.kind!r} preserves what the model makes of the class, 'a star'",
            )
    folders = [concept.folder for concept in recipe.data.concepts]
    if isinstance(recipe.prior, ImagesPrior) and recipe.prior.folder in folders:
        yield Contradiction(("prior", "folder"), "holds the subject's pictures; class images need their own folder")


def _adapter(recipe: Recipe) -> Iterator[Contradiction]:
    adapter = recipe.adapter
    if recipe.recipe in ("lora", "full") and adapter.kind != recipe.recipe:
        yield Contradiction(("adapter", "kind"), f"must be {recipe.recipe} in the recipe {recipe.recipe!r}")
    if adapter.text_encoder_learning_rate is not None and not adapter.text_encoder:
        yield Contradiction(("adapter", "text_encoder_learning_rate"), "is set, but text_encoder is false")
    name = "targets" if isinstance(adapter, LoraConfig) else "select"
    patterns = adapter.targets if isinstance(adapter, LoraConfig) else adapter.select
    for index, pattern in enumerate(patterns if isinstance(patterns, list) else []):
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            yield Contradiction(("adapter", name, index), f"must be a regular expression, not {pattern!r}: {error}")


def _train(recipe: Recipe) -> Iterator[Contradiction]:
    train = recipe.train
    if train.schedule.warmup_steps > train.steps:
        yield Contradiction(
            ("train", "schedule", "warmup_steps"),
            f"must be at most train.steps, which is {train.steps}, not {train.schedule.warmup_steps}",
        )
    if train.device == "cpu" and train.mixed_precision == "fp16":
        yield Contradiction(("train", "mixed_precision"), "must be no or bf16 on the CPU, which cannot train in fp16")


def _outputs(recipe: Recipe) -> Iterator[Contradiction]:
    formats = recipe.export.formats
    if len(set(formats)) < len(formats):
        yield Contradiction(("export", "formats"), f"must name each format once, not {', '.join(formats)}")
    if isinstance(recipe.adapter, FullConfig) and "diffusers" not in formats:
        yield Contradiction(
            ("export", "formats"), "must hold diffusers: kohya is a layout of LoRA files, and the adapter is 'full'"
        )


def _holds(text: str, words: str) -> bool:
    """Whether ``words`` stand in ``text`` as whole words, whatever their case."""
    return _pattern(words).search(text) is not None


def _without(text: str, words: str) -> str:
    return " ".join(_pattern(words).sub(" ", text).split())


def _pattern(words: str) -> re.Pattern[str]:
    spaced = r"\s+".join(map(re.escape, words.split()))
    return re.compile(rf"(?<!\w){spaced}(?!\w)", re.IGNORECASE)
