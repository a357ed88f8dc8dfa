"""What ``verify`` asks of a word's file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from finetune.family import ModelFamily


def check_file(
    report: Report, found: Identity, base: str | None, against: Sequence[str], expected: Mapping[str, Tensor] | None
) -> None:
    """Ask everything, the cheapest first; the base model is asked only where the file itself is sound.

    Args:
        expected: float32 [n, D] of each word that was trained, where they are known.
    """
    stored = report.run("word", lambda: read(found.path), lambda read: f"{read.token}, {len(read.rows)} vectors")
    if stored is None:
        return
    report.run("finite", lambda: check({stored.token: stored.rows}), lambda _: f"{list(stored.rows.shape)}, all finite")
    report.run("learned", lambda: _moved(stored))
    if expected is not None:
        report.run("equal to memory", lambda: _trained(found.path, stored, expected))
    if found.path.suffix == ".pt":
        report.run("archive", lambda: check_archive(found.path))
    for tool in against:
        if tool != "diffusers":
            report.run(tool, lambda tool=tool: _called(tool, found, stored))  # type: ignore[misc]
    if not report.passed or "diffusers" not in against:
        return
    first, second = (load_base(found, base or stored.base) for _ in range(2))
    rows = stored.rows if expected is None else expected[stored.token].to(stored.rows.dtype)
    _check_diffusers(report, found, first, second, Stored(stored.token, rows))


def require_same(path: Path, token: str, rows: Tensor) -> str:
    """The file holds, bit for bit, ``rows`` for ``token``.

    Raises:
        GuardError: it does not.
    """
    held = read(path)
    if held.token != token:
        raise GuardError(f"{path}: holds {held.token!r}, trained was {token!r}")
    if held.rows.dtype != rows.dtype or not torch.equal(held.rows, rows):
        raise GuardError(f"{path}: {token!r} differs from what was trained")
    return f"bit for bit, {len(rows)} vectors"


def _trained(path: Path, stored: Stored, expected: Mapping[str, Tensor]) -> str:
    if stored.token not in expected:
        raise GuardError(f"the word is {stored.token!r}, trained were {', '.join(expected)}")
    return require_same(path, stored.token, expected[stored.token].to(stored.rows.dtype))


def _moved(stored: Stored) -> str:
    if stored.moved == 0.0:
        raise GuardError("nothing was learned: the word is where it began")
    if not bool(stored.rows.any()):
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
def _check_diffusers(report: Report, found: Identity, first: ModelFamily, second: ModelFamily, word: Stored) -> None:
    """Put the rows into one encoder by hand, into another by diffusers' loader, and compare what both make of it."""
    prompts = [f"a photo of a {word.token}", f"{word.token} and {word.token}", "a photo"]
    placed = report.run("base", lambda: _place(first, word), lambda _: "the rows fit its table and are no word's")
    if placed is None:
        return
    pipeline: Any = second.pipeline()
    if report.run("diffusers: loads", lambda: _load(pipeline, found, word.token)) is not None:
        wanted = first.encode_prompt(prompts).tokens
        report.run("diffusers: prompt encoding", lambda: _same(pipeline, prompts, wanted))


def _place(family: ModelFamily, word: Stored) -> bool:
    vocabulary = family.sites.vocabularies[0]
    family.require(vocabulary.network)
    encoder: Any = family.networks[vocabulary.network]
    table = encoder.get_input_embeddings().weight
    if table.shape[1] != word.rows.shape[1]:
        raise GuardError(f"the rows are {word.rows.shape[1]} wide, the base model's {table.shape[1]}")
    for row in word.rows.to(table.dtype):
        if same := (table == row).all(1).nonzero().flatten().tolist():
            known = vocabulary.tokenizer.convert_ids_to_tokens(same[0])
            raise GuardError(f"nothing was learned: a vector of {word.token!r} is still that of {known!r}")
    ids = vocabulary.add(word.token, len(word.rows))
    encoder.resize_token_embeddings(max(len(table), ids[-1] + 1), mean_resizing=False)
    encoder.get_input_embeddings().weight[ids] = word.rows.to(table.dtype)
    return True


def _load(pipeline: Any, found: Identity, token: str) -> str:
    with quiet(), torch.random.fork_rng(devices=[]):
        pipeline.load_textual_inversion(str(found.path), token=token)
    return f"{type(pipeline).__name__}.load_textual_inversion"


def _same(pipeline: Any, prompts: list[str], wanted: Tensor) -> str:
    got = pipeline.encode_prompt(prompts, wanted.device, 1, False)[0]
    if not torch.equal(got, wanted):
        raise GuardError(f"it is off by {float((got - wanted).abs().max()):.1e}")
    return "equal bit for bit"
