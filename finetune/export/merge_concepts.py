"""Several concepts in one model, without training (Kumari et al. 2023, https://arxiv.org/abs/2212.04488, section 3.2).

Each concept has its own weights ``W_i`` of the layers that make keys and values of a prompt. Sought are weights
``W*`` that give each concept's words the outputs of that concept's weights, and change the outputs for ordinary prompts
as little as they can. With the rows of ``K`` features of ordinary prompts, those of ``T`` of the concepts' words and
those of ``V`` what each concept makes of its own:

    C = K^T K,  d = T C^-1,  W* = W + (V^T - W T^T) (d T^T)^-1 d
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.export.base import load_base
from finetune.export.delta import DELTA, base_weights, pack, unpack
from finetune.export.embedding import CONVENTIONAL, Stored, file_stem, read
from finetune.export.embedding import write as write_word
from finetune.export.metadata import OWN
from finetune.export.read import DELTA_FILE, Identity, pieces, read_tensors
from finetune.export.words import load_word
from finetune.family import ModelFamily, Unsupported
from finetune.files import write_tensors
from finetune.randomness import generator

_PHRASE = "modelspec.trigger_phrase"
_PROMPTS, _WORDS = 200, 6  # ordinary prompts, and the words of each
_DAMPING = 1e-8  # of C, as a share of its mean diagonal: few prompts do not span all directions


@dataclass(frozen=True)
class Concept:
    """What a run left: a delta, the words that call it, and a prompt of no more than what it is called."""

    delta: Identity
    words: tuple[Stored, ...]
    prompt: str


def merge_concepts(
    paths: Sequence[Path],
    out: Path,
    prompts: Sequence[str] | None = None,
    ordinary: Sequence[str] | None = None,
    base: str | None = None,
) -> Path:
    """Write one delta for several concepts into the folder ``out``, with copies of their words' files beside it.

    Args:
        paths: folders of Custom Diffusion runs, or deltas.
        prompts: what each concept is called, "<new1> cat", in the order of ``paths``; what its file says where they
            are not given.
        ordinary: prompts whose outputs should stay; random words of the vocabulary where they are not given.
        base: as in a recipe's ``model.path``; what the files say where it is not given.

    Raises:
        UserError: a path holds no delta, they are of different bases or layers, hold other weights than those of keys
            and values of prompts, or share a word.
    """
    if prompts and len(prompts) != len(paths):
        raise UserError(f"{len(paths)} concepts, but {len(prompts)} prompts; there must be one for each")
    concepts = [_concept(path, prompts[i] if prompts else None) for i, path in enumerate(paths)]
    if base is None and len(bases := sorted({concept.delta.base or "?" for concept in concepts})) > 1:
        raise UserError(f"the concepts belong to different base models ({', '.join(bases)}); name one with --base")
    family = load_base(concepts[0].delta, base, prompt_chunks=1)
    trained = [unpack(read_tensors(concept.delta.path), family.export_names) for concept in concepts]
    weights = _base_of(trained, concepts, family)
    pipeline = family.pipeline()
    _learn_words(pipeline, concepts)
    rows = [features(family, pipeline, concept.prompt) for concept in concepts]
    kept = ordinary or ordinary_prompts(family)
    stay = torch.cat([_encode(family, prompt)[0] for prompt in kept]).double()
    merged = {
        name: closed_form(weight, stay, rows, [one[name] for one in trained]).to(weight)
        for name, weight in weights.items()
    }
    for concept in concepts:
        for word in concept.words:
            write_word(out / f"{CONVENTIONAL}-{file_stem(word.token)}.safetensors", word)
    path = out / DELTA_FILE
    write_tensors(path, pack(merged, family.export_names, torch.float32), _header(concepts))
    return path


def closed_form(weight: Tensor, ordinary: Tensor, rows: Sequence[Tensor], trained: Sequence[Tensor]) -> Tensor:
    """``W*`` of the formula above, float64 [out, in].

    Args:
        weight: of the base, [out, in].
        ordinary: K, [n, in].
        rows: of each concept the features of its words, [n_i, in].
        trained: each concept's own weight, [out, in].
    """
    w, k, t = weight.double(), ordinary.double(), torch.cat(list(rows)).double()
    v = torch.cat([one.double() @ own.double().T for own, one in zip(trained, rows, strict=True)])
    c = k.T @ k
    c += _DAMPING * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
    d = torch.linalg.solve(c, t.T).T
    # words that two concepts share have one row and two wishes: the pseudo-inverse then goes half-way
    inverse = torch.linalg.pinv(d @ t.T, rtol=1e-10, hermitian=True)
    return w + (v.T - w @ t.T) @ inverse @ d


def features(family: ModelFamily, pipeline: Any, prompt: str) -> Tensor:
    """The rows of an encoded prompt that stand for its words, without start, end and padding: [n, D]."""
    vocabulary = family.sites.vocabularies[0]
    expanded = pipeline.maybe_convert_prompt(prompt, vocabulary.tokenizer)
    encoded, count = _encode(family, expanded)
    return encoded[1 : 1 + count]


def ordinary_prompts(family: ModelFamily) -> list[str]:
    """Prompts of random words that the tokenizer knows whole: what any model can be asked for."""
    tokenizer = family.sites.vocabularies[0].tokenizer
    words = sorted(token.removesuffix("</w>") for token in tokenizer.get_vocab() if re.fullmatch("[a-z]+</w>", token))
    drawn = torch.randint(len(words), (_PROMPTS, _WORDS), generator=generator(0, "ordinary prompts"))
    return [" ".join(words[index] for index in row) for row in drawn.tolist()]


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        UserError: it cannot be read, or there are none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise UserError(f"{path}: holds no prompts")
    return prompts


@torch.no_grad()
def _encode(family: ModelFamily, prompt: str) -> tuple[Tensor, int]:
    """A prompt as the denoiser reads it, [T, D], and how many tokens its words have."""
    if family.caption_overflow(prompt):
        raise UserError(f"{prompt!r} is too long for the model's text encoder")
    tokenizer = family.sites.vocabularies[0].tokenizer
    count = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    return family.encode_prompt([prompt]).tokens[0], count


def _concept(path: Path, prompt: str | None) -> Concept:
    found = pieces(path)
    deltas = [one for one in found if (one.kind, one.layout) == ("full", DELTA)]
    if not deltas:
        raise UserError(f"{path}: holds no {DELTA_FILE}; a run writes one with export.formats: [delta, ...]")
    prompt = prompt or deltas[0].metadata.get(_PHRASE)
    if not prompt:
        raise UserError(f"{deltas[0].path} does not say what its concept is called; say it with --prompt")
    return Concept(deltas[0], tuple(read(one.path) for one in found if one.kind == "embedding"), prompt)


def _base_of(
    trained: Sequence[Mapping[str, Tensor]], concepts: Sequence[Concept], family: ModelFamily
) -> dict[str, Tensor]:
    """The base's weights in the places that all concepts changed."""
    readers = family.sites.readers
    if isinstance(readers, Unsupported):
        raise UserError(f"concepts of {family.name} cannot be merged: {readers.reason}")
    for one, concept in zip(trained, concepts, strict=True):
        if differing := sorted(one.keys() ^ trained[0].keys()):
            raise UserError(f"{concept.delta.path} and {concepts[0].delta.path} differ in {differing[0]}")
    layers = tuple(f".{reader}.weight" for reader in readers)
    if others := sorted(name for name in trained[0] if not name.endswith(layers)):
        raise UserError(
            f"{concepts[0].delta.path}: holds {others[0]}; only weights that read the prompt can be merged "
            "(select: cross-kv)"
        )
    return dict(base_weights(family.folder, family.export_names, trained[0]))


def _learn_words(pipeline: Any, concepts: Sequence[Concept]) -> None:
    """Teach the pipeline the concepts' words, so that its text encoder reads them."""
    seen: dict[str, Path] = {}
    for concept in concepts:
        for word in concept.words:
            if file_stem(word.token) in seen:
                there = seen[file_stem(word.token)]
                raise UserError(f"{there} and {concept.delta.path} teach the same word {word.token!r}: train another")
            seen[file_stem(word.token)] = concept.delta.path
            load_word(pipeline, word)


def _header(concepts: Sequence[Concept]) -> dict[str, str]:
    """That of the first concept, with all their words."""
    first = dict(concepts[0].delta.metadata)
    for key in (f"{OWN}steps", f"{OWN}seed", "format", "modelspec.usage_hint"):
        first.pop(key, None)
    phrases = ", ".join(concept.prompt for concept in concepts)
    settings = json.loads(first.get(f"{OWN}settings", "{}")) | {"concepts": phrases}
    return first | {
        f"{OWN}recipe": "merge-concepts",
        f"{OWN}settings": json.dumps(settings, sort_keys=True),
        _PHRASE: phrases,
        "modelspec.title": phrases,
    }
