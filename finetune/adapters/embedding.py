"""Textual inversion: new words for a frozen model (Gal et al. 2022, https://arxiv.org/abs/2208.01618).

A word is written ``<zib>`` in captions and stands for one or several vectors in the embedding table of a text encoder.
These are all that learns. As diffusers has it, the tokens of the vectors are ``<zib>``, ``<zib>_1``, ``<zib>_2``, ...
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.adapter import Adapter, ParameterGroup, Weights
from finetune.adapters.select import check_same
from finetune.config.adapters import EmbeddingConfig, NormConfig, TokenConfig
from finetune.errors import UserError, nearest
from finetune.family import ModelFamily, Vocabulary, pool_at_end
from finetune.randomness import generator

GROUP = "embedding"
PATIENCE = 32  # updates: captions drop out, and some batches hold class images alone


class Extended(nn.Embedding):
    """An embedding table with new rows behind it that are a parameter of their own.

    The table's own parameter stays what and where it was, so that optimizer state, gradients and checkpoints are of
    the new rows' size. Where a table scales what it holds, as Gemma's does, new rows are scaled too.

    Attributes:
        new: float32 [n, D], the rows of tokens ``first`` to ``first + n - 1``.
        start: what they were at first.
        untouched: whether ``start`` answers in their place.

    Args:
        table: is not copied.
        first: id of the first new token; ids from here on never reach the table.
        start: float32 [n, D].
    """

    new: nn.Parameter
    start: Tensor
    embed_scale: Tensor | None

    def __init__(self, table: nn.Embedding, first: int, start: Tensor) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, _weight=table.weight, _freeze=True)
        self.weight = table.weight
        self.first = first
        self.untouched = False
        self.new = nn.Parameter(start.clone())
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("embed_scale", getattr(table, "embed_scale", None), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of ``ids`` (long [...]) in the table's dtype, [..., D]."""
        rows = self.start if self.untouched else self.new
        known = super().forward(ids.clamp(max=self.first - 1))
        new = F.embedding((ids - self.first).clamp(min=0), rows).to(known.dtype)
        found = torch.where((ids >= self.first)[..., None], new, known)
        return found if self.embed_scale is None else found * self.embed_scale.to(found.dtype)


class Embedding(Adapter):
    """The vectors of new words in every text encoder of a family; nothing else trains.

    Construct it after adapters that freeze the networks as a whole. ``tables`` holds the extended table of each
    network.

    Args:
        seed: of random initial values, each named by its network and token.

    Raises:
        UserError: a token is a word that the model knows, or an initializer is none.
    """

    kind: ClassVar[str] = "embedding"

    def __init__(self, config: EmbeddingConfig, family: ModelFamily, seed: int) -> None:
        self.config = config
        self.bounded = config.norm is not None or config.progressive_steps is not None
        self.tables: dict[str, Extended] = {}
        self._vocabularies = {vocabulary.network: vocabulary for vocabulary in family.sites.vocabularies}
        family.require("denoiser", *self._vocabularies)
        for network, vocabulary in self._vocabularies.items():
            self._extend(family.networks[network], vocabulary, seed)
        self._names = {
            network: next(name for name, part in family.networks[network].named_modules() if part is table)
            for network, table in self.tables.items()
        }
        self._targets = {network: _Ordinary(table.weight) for network, table in self.tables.items()}

    def _extend(self, encoder: Any, vocabulary: Vocabulary, seed: int) -> None:
        table, tokenizer, network = encoder.get_input_embeddings(), vocabulary.tokenizer, vocabulary.network
        starts = [_start(token, tokenizer, table.weight, seed, network) for token in self.config.tokens]
        ids = [one for token in self.config.tokens for one in vocabulary.add(token.token, token.vectors)]
        extended = Extended(table, ids[0], torch.cat(starts).to(table.weight.device))
        encoder.set_input_embeddings(extended)
        pool_at_end(encoder, tokenizer)
        self.tables[network] = extended

    def groups(self) -> list[ParameterGroup]:
        """One, with the new rows of each text encoder."""
        rows = {f"{network}.{self._names[network]}.new": table.new for network, table in self.tables.items()}
        return [ParameterGroup(GROUP, rows, tables=frozenset(rows), patience=PATIENCE)]

    def networks(self) -> frozenset[str]:
        """The text encoders."""
        return frozenset(self.tables)

    def weights(self) -> Weights:
        """``<network>.<token>`` -> float32 [vectors, D]; the settings say how far each has moved."""
        tensors = {name: rows.cpu().clone() for name, rows in self._rows("new").items()}
        start = self._rows("start")
        moved = {name: float((rows - start[name].cpu()).norm()) for name, rows in tensors.items()}
        settings = self.config.model_dump(mode="json", exclude={"kind"}) | {"moved": moved}
        return Weights(self.kind, tensors, {name: _as_text(value) for name, value in settings.items()})

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put ``weights().tensors`` back, bit for bit.

        Raises:
            UserError: a tensor is missing, unknown or of another shape.
        """
        rows = self._rows("new")
        check_same(rows, tensors)
        for name, held in rows.items():
            held.copy_(tensors[name])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, new words mean what they did at first. Prompts without them are the untouched model's anyway."""
        for table in self.tables.values():
            table.untouched = True
        try:
            yield
        finally:
            for table in self.tables.values():
                table.untouched = False

    def begin_step(self, step: int) -> None:
        """Where words grow, set how many of their tokens stand in a caption: 1, and one more each so many steps."""
        every = self.config.progressive_steps
        for vocabulary in self._vocabularies.values():
            for token in self.config.tokens:
                count = token.vectors if every is None else min(token.vectors, 1 + step // every)
                vocabulary.words[token.token] = token.names[:count]

    @torch.no_grad()
    def end_step(self, rates: Mapping[str, float]) -> None:
        """Keep lengths as ``norm`` says, and rows that no caption holds yet as they were (weight decay moves them)."""
        for network, table in self.tables.items():
            if self.config.norm:
                self._targets[network].keep(table.new, self.config.norm, rates[GROUP])
            if self.config.progressive_steps:
                table.new.copy_(torch.where(self._inserted(network)[:, None], table.new, table.start))

    def penalty(self) -> Tensor | None:
        """``regularisation * |V - V0|^2 / n``, summed over the text encoders."""
        if not self.config.regularisation:
            return None
        distances = [(table.new - table.start).square().sum(1).mean() for table in self.tables.values()]
        return self.config.regularisation * torch.stack(distances).sum()

    def _inserted(self, network: str) -> Tensor:
        words = self._vocabularies[network].words
        flags = [place < len(words[token.token]) for token in self.config.tokens for place in range(token.vectors)]
        return torch.tensor(flags, device=self.tables[network].new.device)

    def _rows(self, which: str) -> dict[str, Tensor]:
        """Views of the rows of each token: "new" or "start"."""
        sizes = [token.vectors for token in self.config.tokens]
        return {
            f"{network}.{token.token}": rows
            for network, table in self.tables.items()
            for token, rows in zip(self.config.tokens, getattr(table, which).detach().split(sizes), strict=True)
        }


class _Ordinary:
    """How long the rows of a table [V, D] are, and how widely their numbers spread."""

    def __init__(self, table: Tensor) -> None:
        self.length = table.detach().float().norm(dim=1).median()
        self.std = table.detach().float().std()

    def keep(self, rows: Tensor, norm: NormConfig, rate: float) -> None:
        """Change ``rows`` [n, D] in place as ``norm.kind`` says; ``rate`` is the learning rate."""
        if norm.kind == "std":
            rows *= (self.std / rows.std(correction=min(1, rows.numel() - 1))) ** 0.1
            return
        lengths = rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
        target = norm.target or self.length
        share = 1.0 if norm.kind == "hard" else min(1.0, 100 * rate)
        rows *= (lengths + share * (target - lengths)) / lengths


def _start(token: TokenConfig, tokenizer: Any, table: Tensor, seed: int, network: str) -> Tensor:
    """Initial rows, float32 [vectors, D]: of the initializer's words in turn, or random and as wide as the table."""
    table = table.detach().float()
    table = table if table.is_meta else table.cpu()  # a plan knows shapes alone
    if token.initializer is None:
        rng = generator(seed, "embedding", network, token.token)
        return torch.randn(token.vectors, table.shape[1], generator=rng).to(table.device) * table.std()
    ids = [_known(word, token, tokenizer, network) for word in token.initializer.split()]
    if not ids:
        raise UserError(f"adapter.tokens: the initializer of {token.token!r} holds no word")
    return torch.stack([table[ids[place % len(ids)]] for place in range(token.vectors)])


def _known(word: str, token: TokenConfig, tokenizer: Any, network: str) -> int:
    # as it stands in a sentence: vocabularies that keep spaces know most words with the space before them
    ids = tokenizer(f" {word}", add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] in tokenizer.all_special_ids:
        pieces = " + ".join(_plain(piece) for piece in tokenizer.convert_ids_to_tokens(ids))
        words = {_plain(name) for name in tokenizer.get_vocab() if _plain(name) != name}
        close = nearest(word, (name for name in words if name[0] == word[0] and abs(len(name) - len(word)) < 3))
        raise UserError(
            f"adapter.tokens: the initializer of {token.token!r} must be of words that are one token each; {word!r} is "
            f"{pieces or 'none'} to the {network}{close if 'did you mean' in close else ''}"
        )
    return int(ids[0])


def _plain(piece: str) -> str:
    """A piece of a vocabulary without the mark that says where its word ends (CLIP) or begins (T5, Qwen)."""
    return piece.removesuffix("</w>").lstrip("▁Ġ") or piece


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
