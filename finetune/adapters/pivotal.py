"""Pivotal tuning: new words and weights together (Roich et al. 2021, https://arxiv.org/abs/2106.05744, for GANs;
for diffusion as cloneofsimo's and diffusers' trainers have it), and Custom Diffusion (Kumari et al. 2023,
https://arxiv.org/abs/2212.04488) where the weights are those of keys and values.

A word alone can say no more than the model could always draw; weights alone have to hang everything on a word that
meant something else. So the word is moved first, or at the same time, and rests from the pivot on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from finetune.adapter import Adapter, ParameterGroup, Weights
from finetune.adapters.embedding import Embedding
from finetune.adapters.full import Full
from finetune.adapters.lora import Lora
from finetune.adapters.memo import PromptMemo
from finetune.config.adapters import FullConfig, PivotalConfig
from finetune.errors import UserError
from finetune.family import ModelFamily


class Pivotal(Adapter):
    """``words`` and ``layers``, two adapters of their own, and the steps in which each moves.

    With ``mode: concurrent`` both move from the first step on, with ``two-phase`` the layers from the pivot on; the
    words rest from there in either. From the pivot on, where no layer of a text encoder trains, every caption is
    encoded once.

    Raises:
        UserError: as the two parts do.
    """

    kind: ClassVar[str] = "pivotal"
    phased: ClassVar[bool] = True

    def __init__(self, config: PivotalConfig, family: ModelFamily, seed: int) -> None:
        self.config = config
        chosen = config.weights
        # in this order: what trains layers freezes all else
        self.layers = Full(chosen, family, seed) if isinstance(chosen, FullConfig) else Lora(chosen, family, seed)
        self.words = Embedding(config.embedding, family, seed)
        self._memo = PromptMemo(family.encode_prompt, self._rows)
        family.encode_prompt = self._memo  # type: ignore[method-assign]
        self.bounded = self.words.bounded or self.layers.bounded
        self._remembers = True
        self._pivot: int | None = None
        self._step = 0
        self._names = {group.name for group in self.words.groups()}

    @property
    def pivot(self) -> int:
        """The update, counted from 0, from which on the words rest.

        Raises:
            RuntimeError: the run has not said how long it is (``begin_run``).
        """
        if self._pivot is None:
            raise RuntimeError("where the pivot is depends on the number of steps: call begin_run first")
        return self._pivot

    def groups(self) -> list[ParameterGroup]:
        """The words with their own rate, "embedding", then the layers' groups: "denoiser", "text_encoder"."""
        rate = self.config.embedding_learning_rate
        words = [replace(group, learning_rate=rate) for group in self.words.groups()]
        return [*words, *self.layers.groups()]

    def networks(self) -> frozenset[str]:
        """The text encoders, and what the layers are in."""
        return self.words.networks() | self.layers.networks()

    def weights(self) -> Weights:
        """All tensors of both parts, whose names differ; the settings of each as JSON under "words" and "layers"."""
        words, layers = self.words.weights(), self.layers.weights()
        settings = {"words": json.dumps(words.settings), "layers": json.dumps(layers.settings)}
        return Weights(self.kind, layers.tensors | words.tensors, settings)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put ``weights().tensors`` back, bit for bit.

        Raises:
            UserError: a tensor is missing, unknown or of another shape.
        """
        of_words = self.words.weights().tensors.keys()
        self.layers.load({name: tensor for name, tensor in tensors.items() if name not in of_words})
        self.words.load({name: tensor for name, tensor in tensors.items() if name in of_words})

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the networks answer as the untouched ones, to which the words are what they began as.

        As with ``Full``, whole weights may be set aside under ``torch.no_grad()`` only.
        """
        with self.layers.disabled(), self.words.disabled():
            self._memo.untouched = True
            try:
                yield
            finally:
                self._memo.untouched = False

    def set_aside(self) -> Mapping[str, Tensor]:
        """As the layers say; words stand behind the table."""
        return self.layers.set_aside()

    def parts(self) -> Sequence[Adapter]:
        """The layers, the words, and both together for files that bundle them."""
        return (self.layers, self.words, self)

    def begin_run(self, steps: int) -> None:
        """Find the step of the pivot. Both parts get one step at least, unless ``pivot`` is 0 or 1.

        Raises:
            UserError: a run of one step has no room for two phases.
        """
        share = self.config.pivot
        if self.config.mode == "two-phase" and steps < 2 and 0 < share < 1:
            raise UserError("train.steps: two phases need 2 steps at least")
        last = steps - 1 if self.config.mode == "two-phase" else steps
        self._pivot = round(share * steps) if share in (0, 1) else min(max(1, round(share * steps)), last)

    def share_networks(self) -> None:
        """Captions are encoded every time: what a process remembers alone keeps the others waiting."""
        self._remembers = False
        self.layers.share_networks()

    def begin_step(self, step: int) -> None:
        """Tell each part how many of its own steps are done."""
        self._step = step
        self.words.begin_step(min(step, max(self.pivot - 1, 0)))  # what is in a caption stays when the words rest
        self.layers.begin_step(max(0, step - self.pivot) if self.config.mode == "two-phase" else step)
        rests = self._words_rest(step) and not self.config.weights.trains_text
        self._memo.active = rests and self._remembers

    def resting(self, step: int) -> frozenset[str]:
        """The words' group from the pivot on; with two phases the layers' groups before it."""
        if self._words_rest(step):
            return frozenset(self._names)
        if self.config.mode == "two-phase":
            return frozenset(group.name for group in self.layers.groups())
        return frozenset()

    def end_step(self, rates: Mapping[str, float]) -> None:
        """Keep within bounds what has moved: a word at rest must not creep towards a norm."""
        resting = self.resting(self._step)
        if not self._names & resting:
            self.words.end_step(rates)
        if not {group.name for group in self.layers.groups()} & resting:
            self.layers.end_step(rates)

    def bytes_beside(self) -> int:
        """Those of the layers."""
        return self.layers.bytes_beside()

    def penalty(self) -> Tensor | None:
        """That of the words, while they move."""
        return None if self._words_rest(self._step) else self.words.penalty()

    def _words_rest(self, step: int) -> bool:
        return step >= self.pivot

    def _rows(self) -> dict[str, Tensor]:
        return {name: value for group in self.words.groups() for name, value in group.parameters.items()}
