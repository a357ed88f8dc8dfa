"""What cannot be meant where words and weights train together."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.config.adapters import FullConfig, LoraConfig, PivotalConfig
from finetune.config.schema import Recipe

Found = tuple[tuple[str | int, ...], str]
"""A key, and the rest of a sentence that begins with it."""

AT = ("adapter",)
WORDS, LORA, FULL = {"diffusers", "a1111"}, {"diffusers", "kohya"}, {"diffusers", "delta", "single-file"}


def contradictions(recipe: Recipe, adapter: PivotalConfig) -> Iterator[Found]:
    """Everything in a pivotal section that cannot be meant."""
    yield from _phases(recipe, adapter)
    weights = adapter.weights
    if isinstance(weights, FullConfig) and weights.text_encoder:
        text = "must be false beside new words: the text encoder's whole weights hold the table that the words stand in"
        yield (*AT, "weights", "text_encoder"), f"{text}; a LoRA can train it"
    if recipe.recipe == "custom_diffusion" and not isinstance(weights, FullConfig):
        yield (*AT, "weights", "kind"), "must be full in custom_diffusion; recipe: pivotal trains words and a LoRA"
    yield from _formats(recipe, adapter)


def _phases(recipe: Recipe, adapter: PivotalConfig) -> Iterator[Found]:
    steps, two = recipe.train.total_steps, adapter.mode == "two-phase"
    if adapter.pivot == 0:
        yield (*AT, "pivot"), "must be more than 0, or the words never learn"
    if two and adapter.pivot == 1:
        yield (*AT, "pivot"), "must be less than 1 with mode two-phase, or the weights never learn"
    if two and steps < 2:
        yield ("train", "steps"), "must be 2 at least: there are two phases"
    every, tokens = adapter.embedding.progressive_steps, adapter.embedding.tokens
    last = (every or 0) * (max(token.vectors for token in tokens) - 1)
    if last and last >= round(adapter.pivot * steps):
        text = f"adds the last vector after {last} steps, but words rest after {round(adapter.pivot * steps)}"
        yield (*AT, "embedding", "progressive_steps"), text


def _formats(recipe: Recipe, adapter: PivotalConfig) -> Iterator[Found]:
    """Each part must be in a file, and each format must have something to hold."""
    if recipe.export.formats is None:
        return
    asked, weights, at = set(recipe.export.formats), adapter.weights, ("export", "formats")
    whole = isinstance(weights, LoraConfig) and "bundle" in asked
    if not asked & WORDS and not whole:
        yield at, "must hold diffusers or a1111 for the words"
    if not asked & (LORA if isinstance(weights, LoraConfig) else FULL) and not whole:
        names = "diffusers, kohya or bundle" if isinstance(weights, LoraConfig) else "delta, diffusers or single-file"
        yield at, f"must hold {names} for the weights"
    for name in sorted(asked & {"delta", "single-file"}) if isinstance(weights, LoraConfig) else ():
        yield at, f"holds {name}, which is for weights: {{kind: full}}"
    if "bundle" not in asked:
        return
    if not isinstance(weights, LoraConfig) or weights.use_dora:
        yield at, "holds bundle, which is a plain LoRA with words in it"
    if dotted := [token.token for token in adapter.embedding.tokens if "." in token.token]:
        yield at, f"holds bundle, whose readers end the name of {dotted[0]!r} at the dot"
