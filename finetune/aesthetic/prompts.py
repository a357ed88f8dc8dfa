"""A pipeline of diffusers whose prompts are drawn towards an aesthetic embedding."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finetune.aesthetic.gradients import Aesthetic, adapt, blend
from finetune.errors import UserError


def attach(pipeline: Any, aesthetic: Aesthetic) -> Attached:
    """Let ``pipeline(prompt)`` adapt a copy of its text encoder to each prompt, until the answer is removed.

    Args:
        pipeline: one of Stable Diffusion 1.x's kind: one CLIP text encoder.

    Raises:
        UserError: the pipeline is of another kind, the projection does not fit its encoder, or it has an embedding
            already.
    """
    kind = type(pipeline).__name__
    encoder, other = getattr(pipeline, "text_encoder", None), getattr(pipeline, "text_encoder_2", None)
    if encoder is None or other is not None or not hasattr(pipeline, "encode_prompt"):
        raise UserError(f"{kind} does not read prompts with one CLIP text encoder, which an aesthetic embedding needs")
    width, expected = encoder.get_input_embeddings().weight.shape[1], aesthetic.projection.shape[1]
    if width != expected:
        raise UserError(f"the aesthetic embedding is for a text encoder {expected} wide, this one is {width} wide")
    if "encode_prompt" in vars(pipeline):
        raise UserError(
            f"this {kind} has an aesthetic embedding already, which must be removed first, or reads prompts in several "
            "chunks, which an aesthetic embedding cannot follow"
        )
    return Attached(pipeline, aesthetic)


class Attached:
    """Stands in for ``encode_prompt`` of one pipeline. As a context manager it removes itself at the end.

    The unconditional or negative prompt, the empty prompt and encodings that a caller brings along stay as they are.
    Prompts of one call are adapted to one by one, so that a prompt's picture does not depend on its neighbours.
    """

    def __init__(self, pipeline: Any, aesthetic: Aesthetic) -> None:
        self.aesthetic = aesthetic
        self._pipeline = pipeline
        self._plain = pipeline.encode_prompt
        pipeline.encode_prompt = self.encode_prompt

    def remove(self) -> None:
        """Give the pipeline its own ``encode_prompt`` back."""
        vars(self._pipeline).pop("encode_prompt", None)

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def encode_prompt(self, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        """As the pipeline's own: encodings [prompts x pictures, L, width] of the prompts and of what guides away."""
        bound = inspect.signature(self._plain).bind(*arguments, **named)
        bound.apply_defaults()
        asked = bound.arguments
        plain, away = self._plain(**asked)
        prompts = [asked["prompt"]] if isinstance(asked["prompt"], str) else asked["prompt"]
        if not prompts or asked["prompt_embeds"] is not None or 0 in (self.aesthetic.steps, self.aesthetic.weight):
            return plain, away
        rows = plain.split(asked["num_images_per_prompt"])
        return torch.cat([self._moved(text, row, asked) for text, row in zip(prompts, rows, strict=True)]), away

    def _moved(self, prompt: str, plain: Tensor, asked: dict[str, Any]) -> Tensor:
        if not prompt.strip():
            return plain
        pipeline, tokenizer = self._pipeline, self._pipeline.tokenizer
        ids = tokenizer(
            pipeline.maybe_convert_prompt(prompt, tokenizer),  # a word of several vectors is several words
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(pipeline.text_encoder.device)
        with self._reading_with(adapt(pipeline.text_encoder, ids, tokenizer.eos_token_id, self.aesthetic)):
            alone = {"prompt": prompt, "negative_prompt": None, "do_classifier_free_guidance": False}
            moved, _ = self._plain(**asked | alone)
        return blend(plain, moved.to(plain), self.aesthetic)

    @contextmanager
    def _reading_with(self, encoder: nn.Module) -> Iterator[None]:
        own = self._pipeline.text_encoder
        self._pipeline.text_encoder = encoder
        try:
            yield
        finally:
            self._pipeline.text_encoder = own
