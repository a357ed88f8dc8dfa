"""How well words fit a picture: CLIP, SigLIP, and the embedded world's own small CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTextModel, SiglipModel
from transformers.utils import logging

from data_tools.captioning import loading
from data_tools.captioning.loading import Source
from finetune import tinyworld
from finetune.errors import UserError

EMBEDDED = "tinyworld"
KINDS: dict[str, Any] = {"clip": CLIPModel, "siglip": SiglipModel}
_AT_ONCE = 256  # texts


class Scorer(Protocol):
    """Puts pictures and texts into one space, where near ones belong together."""

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors of RGB pictures, float32 (B, D) on the CPU."""
        ...

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts, float32 (T, D) on the CPU; what is longer than the model reads is cut."""
        ...


class Clip:
    """CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020) and SigLIP (Zhai et al. 2023, 2303.15343)."""

    def __init__(self, source: Source) -> None:
        if source.kind not in KINDS:
            raise UserError(
                f"{source.option} {source.name}: is a {source.kind!r}, which does not compare words with pictures; "
                f"expected one of {', '.join(KINDS)}, or {EMBEDDED!r}"
            )
        self._source = source
        self._processor = source.processor()
        self._model = source.model(KINDS[source.kind])
        # CLIP reads up to its end token; SigLIP has learned from texts that are padded to its full length
        self._padding = "max_length" if source.kind == "siglip" else True
        self._length = self._model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """As ``Scorer.images``."""
        inputs = self._source.put(self._processor(images=list(images), return_tensors="pt"))
        return _unit(self._model.get_image_features(**inputs))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """As ``Scorer.texts``."""
        inputs = self._processor(
            text=list(texts), padding=self._padding, truncation=True, max_length=self._length, return_tensors="pt"
        )
        return _unit(self._model.get_text_features(**self._source.put(inputs)))


class TinyWorld:
    """The small CLIP of the embedded world, which knows the world's pictures and words alone."""

    def __init__(self) -> None:
        from transformers import AutoTokenizer

        from finetune.tinyworld.towers import Towers

        logging.disable_progress_bar()
        self._towers = Towers.load()
        self._tokenizer = AutoTokenizer.from_pretrained(tinyworld.BASE, subfolder="tokenizer", local_files_only=True)
        encoder: Any = CLIPTextModel.from_pretrained(tinyworld.BASE, subfolder="text_encoder", dtype=torch.float32)
        self._encoder = encoder.eval().requires_grad_(False)

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """As ``Scorer.images``."""
        return _unit(self._towers.embed(images))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """As ``Scorer.texts``."""
        inputs = self._tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        return _unit(self._towers.text_projection(self._encoder(inputs["input_ids"]).pooler_output))


def load_scorer(
    name: str, device: torch.device = loading.CPU, option: str = "--clip", revision: str | None = None
) -> Scorer:
    """The scorer of that name: "tinyworld", a folder or a name of the hub.

    Raises:
        UserError: there is none, or it compares nothing.
    """
    if name == EMBEDDED:
        return TinyWorld()
    return Clip(loading.find(name, revision, device, "float32", option))


def in_parts(scorer: Scorer, texts: Sequence[str]) -> Tensor:
    """``scorer.texts`` of any number of texts."""
    return torch.cat([scorer.texts(texts[start : start + _AT_ONCE]) for start in range(0, len(texts), _AT_ONCE)])


def _unit(found: Any) -> Tensor:
    """Features, which transformers gives bare or as the pooled output of a tower, at length 1."""
    features: Tensor = getattr(found, "pooler_output", found)
    return F.normalize(features.float(), dim=-1).cpu()
