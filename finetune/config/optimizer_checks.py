"""What cannot be meant of an optimizer beside the rest of its recipe."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.config.adapters import AdapterConfig, EmbeddingConfig, LoraConfig, PivotalConfig
from finetune.config.optimizer import AdamW8bitConfig, ClassConfig, Lion8bitConfig, ProdigyConfig, ScheduleFreeConfig
from finetune.config.schema import Recipe
from finetune.errors import UserError

Found = tuple[tuple[str | int, ...], str]
"""A key, and the rest of a sentence that begins with it."""

AT = ("train", "optimizer")


def contradictions(recipe: Recipe) -> Iterator[Found]:
    """Everything about the optimizer that cannot be meant beside the rest of the recipe."""
    try:
        recipe.train.schedule.pairs  # noqa: B018
    except UserError:
        return  # said of the schedule
    match recipe.train.optimizer:
        case ProdigyConfig():
            yield from _prodigy(recipe)
        case ScheduleFreeConfig():
            yield from _schedule_free(recipe)
        case AdamW8bitConfig() | Lion8bitConfig() as chosen if recipe.train.device == "cpu":
            yield (*AT, "name"), f"is {chosen.name}, which needs a CUDA GPU, but train.device is 'cpu'"
        case ClassConfig(options=options):
            for key, instead in (("lr", "train.learning_rate"), ("params", "the adapter")):
                if key in options:
                    yield (*AT, "options", key), f"must not be set: {instead} says it"


def _prodigy(recipe: Recipe) -> Iterator[Found]:
    """Rates that were meant for another optimizer, and ratios that the estimates of groups undo."""
    train = recipe.train
    highest = ("schedule", "rates") if train.schedule.rates is not None else ("learning_rate",)
    rates: list[tuple[tuple[str, ...], float | None]] = [(("train", *highest), train.peak_learning_rate)]
    for at, part in _parts(recipe.adapter):
        for key in ("text_encoder_learning_rate", "embedding_learning_rate"):
            rates.append(((*at, key), getattr(part, key, None)))
        if isinstance(part, LoraConfig) and part.lora_plus_ratio:
            yield (*at, "lora_plus_ratio"), "is set with prodigy, which finds a learning rate for each group by itself"
    for at, rate in rates:
        if rate is not None and not 0.01 <= rate <= 100:
            yield at, f"must be near 1 with prodigy, whose own estimate it multiplies, not {rate:g}"


def _schedule_free(recipe: Recipe) -> Iterator[Found]:
    """What would average a second time, and what moves weights behind the average's back."""
    train = recipe.train
    if train.schedule.name != "constant":
        text = f"must be constant with schedulefree, whose average takes the place of a fall, not {train.schedule.name}"
        yield ("train", "schedule", "name"), text
    if len(train.schedule.pairs) > 1:
        yield ("train", "schedule", "rates"), "must be one rate with schedulefree, which averages instead"
    if train.ema is not None:
        yield ("train", "ema"), "is set with schedulefree, which exports an average of its own"
    for at, part in _parts(recipe.adapter):
        for kind, key in ((LoraConfig, "max_norm"), (EmbeddingConfig, "norm")):
            if isinstance(part, kind) and getattr(part, key):
                yield (*at, key), "is set with schedulefree, whose average does not see what is done after a step"


def _parts(adapter: AdapterConfig) -> Iterator[tuple[tuple[str, ...], AdapterConfig]]:
    """The section of what trains, and those within it."""
    yield ("adapter",), adapter
    if isinstance(adapter, PivotalConfig):
        yield ("adapter", "weights"), adapter.weights
        yield ("adapter", "embedding"), adapter.embedding
