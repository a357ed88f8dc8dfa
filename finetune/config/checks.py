"""What single keys cannot say: settings that contradict each other. Needs no model, no torch and no pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from finetune.config import buckets, memory, objective, optimizer_checks, origin, pivotal, schedule, tools, wording
from finetune.config.adapters import (
    AdapterConfig,
    AestheticConfig,
    EmbeddingConfig,
    FullConfig,
    HypernetworkConfig,
    InjectedConfig,
    LoraConfig,
    OftConfig,
    PivotalConfig,
    new_words,
)
from finetune.config.schema import DataConfig, ImagesPrior, NoPrior, Recipe, TrainConfig

ADAPTERS = {  # recipe -> the kinds of adapter that it trains
    "dreambooth": ("lora", "lokr", "loha", "oft", "full", "embedding", "hypernetwork", "pivotal"),
    "lora": ("lora", "lokr", "loha", "oft"),
    "full": ("full",),
    "textual_inversion": ("embedding",),
    "hypernetwork": ("hypernetwork",),
    "pivotal": ("pivotal",),
    "custom_diffusion": ("pivotal",),
    "aesthetic": ("aesthetic",),
}
FORMATS = {  # kind of adapter -> layouts that its files can have
    "lora": ("diffusers", "kohya"),
    "lokr": ("peft", "kohya"),
    "loha": ("peft", "kohya"),
    "oft": ("peft",),
    "full": ("diffusers", "delta", "single-file"),
    "embedding": ("diffusers", "a1111"),
    "hypernetwork": ("diffusers", "a1111"),
    "aesthetic": ("diffusers", "a1111"),
    "pivotal": ("diffusers", "kohya", "a1111", "bundle", "delta", "single-file"),
}


class Contradiction(NamedTuple):
    """Which key is wrong and why, as the rest of a sentence that begins with the key."""

    path: tuple[str | int, ...]
    text: str


def contradictions(recipe: Recipe) -> Iterator[Contradiction]:
    """Everything in ``recipe`` that cannot be meant."""
    yield from _concepts(recipe)
    for section in (origin, buckets, wording, objective, memory):
        yield from (Contradiction(*found) for found in section.contradictions(recipe))
    yield from _prior(recipe)
    yield from _adapter(recipe)
    yield from _train(recipe)
    yield from _samples(recipe)
    yield from _outputs(recipe)


def _concepts(recipe: Recipe) -> Iterator[Contradiction]:
    for index, concept in enumerate(recipe.data.concepts):
        at = ("data", "concepts", index)
        if concept.captions == "prompt" and concept.prompt is None:
            yield Contradiction((*at, "captions"), "is 'prompt', but the concept has no prompt")
        if recipe.data.balance and concept.repeats != 1:
            yield Contradiction((*at, "repeats"), "must be 1 with data.balance, which draws all concepts equally often")
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
        if recipe.recipe != "dreambooth" or concept.embedded:
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
    if recipe.recipe == "aesthetic":
        yield Contradiction(("prior", "kind"), "must be none: an aesthetic embedding trains no weights")
        return
    for index, concept in enumerate(recipe.data.concepts):
        if concept.class_prompt is None and not concept.embedded:
            yield Contradiction(
                ("data", "concepts", index, "class_prompt"),
                f"is missing: prior {recipe.prior.kind!r} preserves what the model makes of the class, 'a star'",
            )
    folders = [concept.folder for concept in recipe.data.concepts if concept.folder]
    if isinstance(recipe.prior, ImagesPrior) and recipe.prior.folder in folders:
        yield Contradiction(("prior", "folder"), "holds the subject's pictures; class images need their own folder")


def _adapter(recipe: Recipe) -> Iterator[Contradiction]:
    adapter = recipe.adapter
    kinds = ADAPTERS[recipe.recipe]
    if adapter.kind not in kinds:
        yield Contradiction(("adapter", "kind"), f"must be {' or '.join(kinds)} in the recipe {recipe.recipe!r}")
    parts: list[tuple[tuple[str, ...], AdapterConfig]] = [(("adapter",), adapter)]
    if isinstance(adapter, PivotalConfig):
        parts = [(("adapter", "weights"), adapter.weights), (("adapter", "embedding"), adapter.embedding)]
    for at, part in parts:
        yield from _weights(at, part)
    if words := new_words(adapter):
        at = ("adapter", "embedding") if isinstance(adapter, PivotalConfig) else ("adapter",)
        yield from _words(at, recipe, words)
    if isinstance(adapter, PivotalConfig):
        yield from (Contradiction(*found) for found in pivotal.contradictions(recipe, adapter))
    if isinstance(adapter, HypernetworkConfig):
        yield from _hypernetwork(adapter)
    if isinstance(adapter, AestheticConfig):
        yield from _aesthetic(recipe, adapter)


def _words(at: tuple[str, ...], recipe: Recipe, words: EmbeddingConfig) -> Iterator[Contradiction]:
    """New words that would be mistaken for each other, stand where they must not, or never learn."""
    for index, token in enumerate(words.tokens):
        others = [name for place, other in enumerate(words.tokens) if place != index for name in other.names]
        if mistaken := [name for name in others if token.token.lower() in name.lower()]:
            here: tuple[str | int, ...] = (*at, "tokens", index, "token")
            yield Contradiction(here, f"must be no part of another word; {token.token!r} is part of {mistaken[0]!r}")
        needed = (token.vectors - 1) * (words.progressive_steps or 0)
        if needed and recipe.train.total_steps <= needed:
            text = (
                f"must be less: {token.token!r} is whole after {needed} steps, the run has {recipe.train.total_steps}"
            )
            yield Contradiction((*at, "progressive_steps"), text)
    if words.norm and words.norm.kind == "std" and words.norm.target is not None:
        yield Contradiction((*at, "norm", "target"), "is set, but std keeps the spread of the numbers and no length")
    for index, concept in enumerate(recipe.data.concepts):
        for word in words.words:
            if concept.class_prompt and word.lower() in concept.class_prompt.lower():
                text = f"must not contain the new word {word!r}: it names the class, not the subject"
                yield Contradiction(("data", "concepts", index, "class_prompt"), text)
        if words.templates and words.name(concept.trigger) is None:
            yield Contradiction(
                ("data", "concepts", index, "trigger"),
                f"must say which new word [name] in the templates is here: {' or '.join(words.words)}",
            )


def _aesthetic(recipe: Recipe, adapter: AestheticConfig) -> Iterator[Contradiction]:
    """What has no part in a recipe that trains no weights, and what it needs that others do not."""
    for name in type(recipe.train).model_fields:
        if name not in ("device", "threads") and getattr(recipe.train, name) != getattr(TrainConfig(), name):
            yield Contradiction(("train", name), "has no part in an aesthetic embedding, which trains no weights")
    drawing = ("balance", "crop", "flip", "buckets", "more_resolutions", "unmasked_weight", "unmasked_probability")
    for name in (*drawing, "caption_dropout", "caption_dropout_every_n_epochs", "wording"):
        if getattr(recipe.data, name) != DataConfig.model_fields[name].get_default():
            yield Contradiction(("data", name), "has no part in an aesthetic embedding: whole pictures are averaged")
    for index, concept in enumerate(recipe.data.concepts):
        if concept.masks is not None:
            at = ("data", "concepts", index, "masks")
            yield Contradiction(at, "has no part in an aesthetic embedding: whole pictures are averaged")
    if recipe.model.prompt_chunks > 1:
        yield Contradiction(
            ("model", "prompt_chunks"), "must be 1: an aesthetic embedding follows prompts of one chunk"
        )
    for section, key in (("samples", recipe.samples.every), ("checkpoint", recipe.checkpoint.every)):
        if key is not None:
            yield Contradiction((section, "every"), "has no part in an aesthetic embedding, which takes no steps")
    if recipe.model.path != origin.EMBEDDED.removesuffix(":") and adapter.clip is None:
        text = "is missing: name the CLIP whose text tower the model reads prompts with; Stable Diffusion 1.x has "
        yield Contradiction(("adapter", "clip"), text + "openai/clip-vit-large-patch14")
    if recipe.report.enabled and not recipe.report.prompts:
        yield Contradiction(("report", "prompts"), "is empty: an aesthetic embedding is shown on prompts of yours")
    if adapter.bake_prompts and not adapter.steps:
        yield Contradiction(("adapter", "bake_prompts"), "is set, but steps is 0, so that nothing would change")
    if adapter.bake_prompts and not set(_baked(recipe)) & set(FORMATS["lora"]):
        yield Contradiction(("adapter", "bake_prompts"), "makes a LoRA; export.formats must hold diffusers or kohya")


def _baked(recipe: Recipe) -> Sequence[str]:
    """The formats of the LoRA that an aesthetic embedding is baked into."""
    chosen = recipe.export.tools
    return tools.formats(chosen, "lora") if chosen else recipe.export.formats or ["diffusers"]


def _weights(at: tuple[str, ...], adapter: AdapterConfig) -> Iterator[Contradiction]:
    """What contradicts itself in a section that trains layers."""
    if not isinstance(adapter, InjectedConfig | FullConfig):
        return
    if adapter.text_encoder_learning_rate is not None and not adapter.text_encoder:
        yield Contradiction((*at, "text_encoder_learning_rate"), "is set, but text_encoder is false")
    name = "select" if isinstance(adapter, FullConfig) else "targets"
    patterns = adapter.select if isinstance(adapter, FullConfig) else adapter.targets
    for index, pattern in enumerate(patterns if isinstance(patterns, list) else []):
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            yield Contradiction((*at, name, index), f"must be a regular expression, not {pattern!r}: {error}")
    if isinstance(adapter, LoraConfig):
        yield from _lora(at, adapter)


def _lora(at: tuple[str, ...], adapter: LoraConfig) -> Iterator[Contradiction]:
    """Variants of LoRA that cannot be had together."""
    if adapter.use_dora:
        if adapter.rank_dropout:
            yield Contradiction((*at, "rank_dropout"), "must be 0 with use_dora: rows' lengths depend on all ranks")
        if adapter.max_norm:
            yield Contradiction((*at, "max_norm"), "is set with use_dora, where B A is a direction and not the change")
    if adapter.init == "pissa":
        for name in ("dropout", "rank_dropout", "module_dropout"):
            if getattr(adapter, name):
                yield Contradiction((*at, name), "must be 0 with init: pissa, where it would leave out the base itself")
        if adapter.max_norm:
            yield Contradiction((*at, "max_norm"), "is set with init: pissa, where B A holds the base's largest part")
    for pattern in adapter.ranks:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            yield Contradiction((*at, "ranks", pattern), f"is no regular expression: {error}")


def _hypernetwork(adapter: HypernetworkConfig) -> Iterator[Contradiction]:
    """Networks that could not be added to what they read, or that could never learn."""
    layers, dropout = adapter.layers, adapter.dropout
    if layers[0] != 1 or layers[-1] != 1:
        yield Contradiction(("adapter", "layers"), "must begin and end with 1: what comes out is added to what went in")
    if dropout is not None and (len(dropout) != len(layers) or dropout[0] or dropout[-1]):
        yield Contradiction(
            ("adapter", "dropout"),
            f"must have as many entries as layers, which has {len(layers)}, the first and the last 0",
        )
    if len(set(adapter.sizes or [])) < len(adapter.sizes or []):
        yield Contradiction(("adapter", "sizes"), "must name each width once")
    if adapter.zero_last and adapter.activate_output and adapter.activation != "linear" and not adapter.layer_norm:
        yield Contradiction(
            ("adapter", "zero_last"),
            "is set with activate_output: an activation of zeros may not be 0, or has no gradient to learn from",
        )


def _train(recipe: Recipe) -> Iterator[Contradiction]:
    train = recipe.train
    for found in (*schedule.contradictions(recipe), *optimizer_checks.contradictions(recipe)):
        yield Contradiction(*found)
    if train.device == "cpu" and train.mixed_precision == "fp16":
        yield Contradiction(("train", "mixed_precision"), "must be no or bf16 on the CPU, which cannot train in fp16")


def _samples(recipe: Recipe) -> Iterator[Contradiction]:
    adapter = recipe.adapter.weights if isinstance(recipe.adapter, PivotalConfig) else recipe.adapter
    if recipe.samples.strength != 1.0 and isinstance(adapter, FullConfig | EmbeddingConfig | OftConfig):
        what = {"full": "whole weights", "embedding": "words", "oft": "rotations"}[adapter.kind]
        yield Contradiction(("samples", "strength"), f"must be 1: {what} are drawn with or not")


def _outputs(recipe: Recipe) -> Iterator[Contradiction]:
    formats = recipe.export.formats or []
    if len(set(formats)) < len(formats):
        yield Contradiction(("export", "formats"), f"must name each format once, not {', '.join(formats)}")
    chosen = recipe.export.tools or []
    if formats and chosen:
        yield Contradiction(("export", "for"), "names tools, and formats names layouts; only one of them can choose")
    if len(set(chosen)) < len(chosen):
        yield Contradiction(("export", "for"), f"must name each tool once, not {', '.join(chosen)}")
    for place, text in tools.objections(chosen, recipe.adapter):
        yield Contradiction(("export", "for", place), text)
    known = FORMATS[recipe.adapter.kind]
    if formats and not set(formats) & set(known):
        yield Contradiction(
            ("export", "formats"), f"must hold {' or '.join(known)}: the adapter is {recipe.adapter.kind!r}"
        )


def _holds(text: str, words: str) -> bool:
    """Whether ``words`` stand in ``text`` as whole words, whatever their case."""
    return _pattern(words).search(text) is not None


def _without(text: str, words: str) -> str:
    return " ".join(_pattern(words).sub(" ", text).split())


def _pattern(words: str) -> re.Pattern[str]:
    spaced = r"\s+".join(map(re.escape, words.split()))
    return re.compile(rf"(?<!\w){spaced}(?!\w)", re.IGNORECASE)
