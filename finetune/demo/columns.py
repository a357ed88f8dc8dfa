"""What the page draws, without the page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from finetune.config.schema import ModelConfig, SamplerConfig
from finetune.errors import UserError
from finetune.export.base import load_base
from finetune.export.kinds import lora
from finetune.export.metadata import OWN
from finetune.export.origin import triggers
from finetune.export.read import pieces
from finetune.export.sample import adapted
from finetune.family import ModelFamily
from finetune.sampling import draw


@dataclass(frozen=True)
class Settings:
    """What is the same in all columns, and the strengths, which are not.

    Attributes:
        strengths: 0 is the base as it was before, 1 what was trained.
        seed: of the noise that all pictures start from.
        resolution: side in pixels; the model's own where it is not set.
    """

    strengths: tuple[float, ...] = (0.0, 0.5, 1.0)
    negative: str = ""
    seed: int = 0
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    resolution: int | None = None


class Columns:
    """An adapter that is drawn with at one strength after the other.

    One model is in memory. A plain LoRA is scaled where it is; other kinds have put their changes into the weights,
    so that for another strength the model is loaded anew.

    Args:
        adapter: a file, a model folder or a run's folder.
        base: as in a recipe's ``model.path``; what the file says where it is not given.
        device: a GPU where there is one.
        held: a recipe's ``model``, where the base shall lie in memory as it does there; else all of it is float32.

    Raises:
        UserError: there is no such adapter, or it does not say its base and none is named.
    """

    def __init__(
        self,
        adapter: Path,
        base: str | None = None,
        device: torch.device | str | None = None,
        held: ModelConfig | None = None,
    ) -> None:
        self._adapter, self._base, self._held = adapter, base, held
        self._pieces = pieces(adapter)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._scaled = [one.kind for one in self._pieces] == ["lora"] and self._pieces[0].layout != "difference"
        family = load_base(self._pieces[0], base)
        self._scaled = self._scaled and not family.sampling  # else the base has a scheduler of its own
        self._family: ModelFamily | None = None
        self._strength = 1.0

    @property
    def title(self) -> str:
        """What the adapter is called."""
        return self._adapter.stem if self._adapter.is_file() else self._adapter.resolve().name

    @property
    def prompt(self) -> str:
        """How to ask for what was learned, as far as the files tell."""
        hints = [one.metadata.get("modelspec.usage_hint", "").removeprefix("prompt: ") for one in self._pieces]
        words = [word for one in self._pieces for word in triggers(one.path, one.metadata)]
        return next((found for found in (*hints, *words) if found), "")

    @property
    def strengths(self) -> tuple[float, ...]:
        """Those that are worth comparing: of a word and of a rotation there is none between 0 and 1."""
        if self._pieces[0].whole:
            return (1.0,)
        rotates = any(one.metadata.get(f"{OWN}algorithm") == "oft" for one in self._pieces)
        return (0.0, 1.0) if rotates or {one.kind for one in self._pieces} == {"embedding"} else (0.0, 0.5, 1.0)

    def __call__(self, prompt: str, settings: Settings) -> Iterator[tuple[float, Image.Image]]:
        """Draw the columns, each as soon as it is asked for: its strength and its picture.

        At strength 1 it is the picture of ``finetune sample``, at 0 that of the base alone.

        Raises:
            UserError: the adapter has no such strength, or the settings do not fit the model.
        """
        for strength in settings.strengths:
            family = self._at(strength)
            (picture,) = draw(
                family,
                [prompt],
                1,
                settings.sampler,
                settings.seed,
                resolution=settings.resolution,
                negative=settings.negative,
            )
            yield strength, picture

    def _at(self, strength: float) -> ModelFamily:
        if self._family is not None and strength != self._strength:
            if self._scaled:
                lora.rescale(self._family.pipeline(), strength)
                self._strength = strength
            else:
                self._family = None  # before another one is loaded
        if self._family is None:
            self._family, self._strength = self._load(strength), strength
        return self._family

    def _load(self, strength: float) -> ModelFamily:
        if strength != 0.0 or self._scaled:
            return adapted(self._adapter, self._base, strength, self._device, held=self._held)
        if self._pieces[0].whole:
            raise UserError(f"{self._adapter} is a whole model, which has no strength but 1")
        family = load_base(self._pieces[0], self._base, held=self._held)
        family.sampling, family.device = {}, self._device  # nothing of what was trained, its scheduler neither
        family.pipeline()  # loads it, so that it stays between pictures
        return family


def strengths_of(text: str) -> tuple[float, ...]:
    """Numbers with commas between them.

    Raises:
        UserError: they are none.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(
            f"strengths: expected numbers with commas between them, such as 0,0.5,1, not {text!r}"
        ) from error
