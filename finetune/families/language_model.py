"""What families have in common whose only text encoder is a language model: Z-Image, Qwen-Image, FLUX.2, Lumina 2,
Sana.

A caption is put into the template of a conversation or behind an instruction, and the denoiser reads what the model
makes of it on the way.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from finetune.batch import Conditioning
from finetune.families.folder import DiffusersFolder
from finetune.families.two_streams import READERS
from finetune.family import Unsupported, Vocabulary

TEXT_ENCODER = "text_encoder"


class LanguageModelFolder(DiffusersFolder):
    """A model with one language model in front of a transformer that reads prompt and picture as one sequence.

    The language model itself does not train: diffusers' loaders take no LoRA for it. New words do.
    """

    readers: ClassVar[tuple[str, str] | Unsupported] = READERS
    chunks: ClassVar[Unsupported | None] = Unsupported("a language model reads a caption whole")
    length: int
    """Tokens that the pipeline lets the language model read, those of the template included."""

    @abstractmethod
    def wrap(self, text: str) -> str:
        """``text`` in the template that the pipeline puts prompts into, all special tokens written out."""

    def read(self, captions: Sequence[str]) -> Sequence[str]:
        """``captions`` as the language model gets them: new words written out, in the template."""
        return [self.wrap(self._vocabulary.expand(caption)) for caption in captions]

    def told(self, captions: Sequence[str], **padding: Any) -> Mapping[str, list[list[int]]]:
        """A tokenizer's "input_ids" and "attention_mask" of ``captions``, cut at ``length``; each a list of rows."""
        told: Mapping[str, list[list[int]]] = self.tokenizers[TEXT_ENCODER](
            self.read(captions), add_special_tokens=False, max_length=self.length, truncation=True, **padding
        )
        return told

    def caption_overflow(self, caption: str, words: Mapping[str, int] | None = None) -> int:
        """How many tokens of ``caption`` and of the template's end are cut off."""
        return max(0, self.count(caption, words) - self.length)

    def count(self, caption: str, words: Mapping[str, int] | None = None) -> int:
        """How many tokens ``caption`` is in its template; arguments as of ``caption_overflow``."""
        tokenizer, known = partial(self._vocabulary.tokenizer, add_special_tokens=False), words or {}
        if not known:
            return len(tokenizer(self.read([caption])[0]).input_ids)
        # a word takes the spaces before it with it, see ``finetune.family.Vocabulary.add``
        parts = re.split(rf"\s*({'|'.join(map(re.escape, known))})", self.wrap(caption))
        return sum(known.get(part) or len(tokenizer(part).input_ids) for part in parts)

    @property
    def _vocabulary(self) -> Vocabulary:
        return self.vocabularies[TEXT_ENCODER]


def ask(encoder: Any, told: Mapping[str, Sequence[Sequence[int]]]) -> Sequence[Tensor]:
    """A language model's states before its first layer and behind each, every one [N, T, D].

    Args:
        told: a tokenizer's "input_ids" and "attention_mask", N rows of T.
    """
    ids = torch.tensor(told["input_ids"], device=encoder.device)
    mask = torch.tensor(told["attention_mask"], dtype=torch.bool, device=encoder.device)
    if mask.is_meta:  # a plan's tensors have shapes alone; only of a mask for every pair are no values looked at
        mask = mask[:, None, None].expand(-1, 1, ids.shape[1], -1)
    states: Sequence[Tensor] = encoder.base_model(  # without the head that predicts words
        input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
    ).hidden_states
    return states


def apart(prompt: Conditioning) -> list[Tensor]:
    """The tokens of each prompt, [T, D], without what makes them as long as the longest."""
    whole = list(prompt.tokens.unbind(0))
    return (
        whole if prompt.lengths is None else [row[:length] for row, length in zip(whole, prompt.lengths, strict=True)]
    )
