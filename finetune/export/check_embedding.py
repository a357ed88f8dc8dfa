"""What ``verify`` asks of a word's file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.errors import GuardError
from finetune.export.base import load_base
from finetune.export.checks import Report, quiet
from finetune.export.embedding import Stored, file_stem, read
from finetune.export.layers import check
from finetune.export.pickles import check_archive
from finetune.export.read import Identity
from finetune.export.words import load_word
from finetune.family import ModelFamily, Vocabulary, pool_at_end


def check_file(
    report: Report, found: Identity, base: str | None, against: Sequence[str], expected: Mapping[str, Tensor] | None
) -> None:
    """Ask everything, the cheapest first; the base model is asked only where the file itself is sound.

    Args:
        expected: ``<network>.<token>`` -> float32 [n, D] of what was trained, where it is known.
    """
    stored = report.run("word", lambda: read(found.path), lambda read: f"{read.token}, {read.vectors} vectors")
    if stored is None:
        return
    named = {encoder or stored.token: rows for encoder, rows in stored.parts.items()}
    sizes = ", ".join(str(list(rows.shape)) for rows in named.values())
    report.run("finite", lambda: check(named), lambda _: f"{sizes}, all finite")
    report.run("learned", lambda: _moved(stored))
    if expected is not None:
        report.run("equal to memory", lambda: _trained(stored, expected))
    if found.path.suffix == ".pt":
        report.run("archive", lambda: check_archive(found.path))
    for tool in against:
        if tool != "diffusers":
            report.run(tool, lambda tool=tool: _called(tool, found, stored))  # type: ignore[misc]
    if not report.passed or "diffusers" not in against:
        return
    first, second = (load_base(found, base or stored.base) for _ in range(2))
    _check_diffusers(report, first, second, stored)


def require_same(path: Path, word: Stored) -> str:
    """The file holds, bit for bit, this word.

    Raises:
        GuardError: it does not.
    """
    held = read(path)
    if held.token != word.token:
        raise GuardError(f"{path}: holds {held.token!r}, trained was {word.token!r}")
    if held.parts.keys() != word.parts.keys() or any(
        held.parts[name].dtype != rows.dtype or not torch.equal(held.parts[name], rows)
        for name, rows in word.parts.items()
    ):
        raise GuardError(f"{path}: {word.token!r} differs from what was trained")
    return f"bit for bit, {word.vectors} vectors"


def _trained(stored: Stored, expected: Mapping[str, Tensor]) -> str:
    """The file's rows are those of the networks that trained, in the networks' order."""
    wanted = [rows for key, rows in expected.items() if key.partition(".")[2] == stored.token]
    if not wanted:
        raise GuardError(f"the word is {stored.token!r}, trained were {', '.join(expected)}")
    held = list(stored.parts.values())
    same = len(held) == len(wanted)
    if not same or not all(torch.equal(one, rows.to(one)) for one, rows in zip(held, wanted, strict=True)):
        raise GuardError(f"{stored.token!r} differs from what was trained")
    return f"bit for bit, {stored.vectors} vectors"


def _moved(stored: Stored) -> str:
    if stored.moved == 0.0:
        raise GuardError("nothing was learned: the word is where it began")
    if not any(bool(rows.any()) for rows in stored.parts.values()):
        raise GuardError("nothing was learned: every number is zero")
    return "not zero" if stored.moved is None else f"{stored.moved:.3g} from where it began"


def _called(tool: str, found: Identity, stored: Stored) -> str:
    if tool in ("a1111", "comfyui"):
        if found.path.stem != file_stem(found.path.stem):
            raise GuardError(f"{found.path.name} is no name that stands in a prompt as one word")
        prefix = "embedding:" if tool == "comfyui" else ""
        return f"in prompts {prefix}{found.path.stem}, after the file's name"
    return f"in prompts {stored.token}"


@torch.no_grad()
def _check_diffusers(report: Report, first: ModelFamily, second: ModelFamily, word: Stored) -> None:
    """Put the rows into one encoder by hand, into another by diffusers' loader, and compare what both make of it."""
    prompts = [f"a photo of a {word.token}", f"{word.token} and {word.token}", "a photo"]
    placed = report.run("base", lambda: _placed(first, word), lambda _: "the rows fit its table and are no word's")
    if placed is None:
        return
    pipeline: Any = second.pipeline()
    if report.run("diffusers: loads", lambda: _load(pipeline, word)) is not None:
        report.run("diffusers: prompt encoding", lambda: _same(pipeline, prompts, first))


def _placed(family: ModelFamily, word: Stored) -> bool:
    vocabularies = family.sites.vocabularies
    if len(vocabularies) != len(word.parts):
        raise GuardError(f"the file is for {len(word.parts)} text encoders, the base model has {len(vocabularies)}")
    for vocabulary, rows in zip(vocabularies, word.parts.values(), strict=True):
        _place(family, vocabulary, word.token, rows)
    return True


def _place(family: ModelFamily, vocabulary: Vocabulary, token: str, rows: Tensor) -> None:
    family.require(vocabulary.network)
    encoder: Any = family.networks[vocabulary.network]
    table = encoder.get_input_embeddings().weight
    if table.shape[1] != rows.shape[1]:
        raise GuardError(f"the rows are {rows.shape[1]} wide, the base model's {table.shape[1]}")
    for row in rows.to(table.dtype):
        if same := (table == row).all(1).nonzero().flatten().tolist():
            known = vocabulary.tokenizer.convert_ids_to_tokens(same[0])
            raise GuardError(f"nothing was learned: a vector of {token!r} is still that of {known!r}")
    ids = vocabulary.add(token, len(rows))
    encoder.resize_token_embeddings(max(len(table), ids[-1] + 1), mean_resizing=False)
    encoder.get_input_embeddings().weight[ids] = rows.to(table.dtype)
    pool_at_end(encoder, vocabulary.tokenizer)


def _load(pipeline: Any, word: Stored) -> str:
    with quiet():
        load_word(pipeline, word)
    if not hasattr(pipeline, "load_textual_inversion"):
        return "into tokenizers and tables: the pipeline has no loader"
    return f"{type(pipeline).__name__}.load_textual_inversion"


def _same(pipeline: Any, prompts: list[str], family: ModelFamily) -> str:
    """Among the tensors that the pipeline makes of each prompt are those that the family makes."""
    known = signature(pipeline.encode_prompt).parameters
    for prompt in prompts:
        wanted = family.encode_prompt([prompt])
        asked = {"prompt": [prompt], "device": wanted.tokens.device, "num_images_per_prompt": 1}
        asked |= {"do_classifier_free_guidance": False, "prompt_2": None, "prompt_3": None}  # as the first
        got = pipeline.encode_prompt(**{name: value for name, value in asked.items() if name in known})
        found = [one[0] for one in got if one is not None and len(one)]  # of tensors or lists of them
        for tensor in (wanted.tokens, wanted.pooled):
            if tensor is not None and not any(torch.equal(one, tensor[0]) for one in found):
                raise GuardError(f"{list(tensor.shape)} differs from what the family makes of {prompt!r}")
    return "equal bit for bit"
