"""Captions encoded once, from the moment that nothing in a text encoder trains any more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from finetune.batch import Conditioning

MOST = 4096  # captions that are remembered; where draws shuffle their tags there is no end of them

Encode = Callable[[Sequence[str]], Conditioning]


class PromptMemo:
    """Stands in front of ``ModelFamily.encode_prompt``: passes calls on, or remembers what each caption became.

    Each caption is encoded alone, so that what is remembered does not depend on the batch it first came in, and a run
    that is continued sees the same numbers. Conditionings are without gradient.

    Attributes:
        active: whether it remembers.
        untouched: whether it is now asked for what the untouched model makes of captions, which is another thing.

    Args:
        encode: the family's own.
        depends_on: trained tensors that encodings depend on beside the caption, by name. When one changes, as when an
            average takes its place for a while, everything is forgotten.
    """

    def __init__(self, encode: Encode, depends_on: Callable[[], Mapping[str, Tensor]]) -> None:
        self.active, self.untouched = False, False
        self._encode, self._depends_on = encode, depends_on
        self._known: dict[tuple[bool, str], Conditioning] = {}
        self._made_with: dict[str, Tensor] = {}

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        """The captions as the denoiser reads them."""
        if not self.active:
            return self._encode(captions)
        self._forget_what_is_outdated()
        if len(self._known) + len(set(captions)) > MOST:
            self._known.clear()
        for caption in captions:
            if (self.untouched, caption) not in self._known:
                with torch.no_grad():
                    self._known[self.untouched, caption] = self._encode([caption])
        return Conditioning.stack([self._known[self.untouched, caption] for caption in captions])

    def _forget_what_is_outdated(self) -> None:
        now = self._depends_on()
        if self._made_with.keys() != now.keys() or any(
            not torch.equal(value, self._made_with[name]) for name, value in now.items()
        ):
            self._known.clear()
            self._made_with = {name: value.detach().clone() for name, value in now.items()}
