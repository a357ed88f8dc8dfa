"""Words from a generating model, chosen so that a row of a batch knows nothing of the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from data_tools.captioning.captioner import Caption, Decoding


class GumbelNoise(LogitsProcessor):
    """Gumbel noise on the logits of each row, from the row's own generator.

    The largest of logits with such noise is a sample of their softmax (Gumbel 1954; Maddison et al. 2014,
    https://arxiv.org/abs/1411.0030): a search for the likeliest token then samples, without torch's global generator.

    Args:
        generators: one for each row; rows with None are left as they are.
    """

    def __init__(self, generators: Sequence[torch.Generator | None]) -> None:
        self._generators = generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [rows, tokens] with noise."""
        noisy = scores.float().clone()
        for row, generator in zip(noisy, self._generators, strict=True):
            if generator is not None:
                uniform = torch.rand(len(row), generator=generator).clamp_min(torch.finfo(torch.float32).tiny)
                row -= (-uniform.log()).log().to(row.device)
        return noisy


@torch.inference_mode()
def generate(
    model: Any, inputs: Mapping[str, Tensor], decoding: Decoding, generators: Sequence[torch.Generator | None]
) -> Tensor:
    """Tokens of ``model.generate``, which samples nothing of its own, whatever the model's files say."""
    choosing = LogitsProcessorList()
    if any(generator is not None for generator in generators):
        choosing.append(TemperatureLogitsWarper(decoding.temperature))
        choosing.append(TopPLogitsWarper(decoding.top_p))
        choosing.append(GumbelNoise(generators))
    tokens: Tensor = model.generate(
        **inputs,
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.beams,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        logits_processor=choosing,
    )
    return tokens


def as_captions(texts: Iterable[str], written: Tensor, decoding: Decoding, ends: Iterable[int]) -> list[Caption]:
    """Decoded texts as captions.

    Args:
        written: the tokens of each, [rows, tokens], without those of the prompt.
        ends: tokens that a caption ends with.
    """
    stopped = torch.isin(written[:, : decoding.max_new_tokens - 1], torch.tensor(list(ends), device=written.device))
    full = ~stopped.any(1) & (written.shape[1] >= decoding.max_new_tokens)
    return [Caption(" ".join(text.split()), cut) for text, cut in zip(texts, full.tolist(), strict=True)]


def end_tokens(config: Any) -> list[int]:
    """The tokens that a generation config ends with."""
    ends = config.eos_token_id
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else list(ends)
