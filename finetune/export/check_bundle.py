"""What ``verify`` asks of a LoRA file with new words in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.adapter import Weights
from finetune.errors import GuardError
from finetune.export import kohya
from finetune.export.bundle import Parts, load_bundle, pack, parts_of, unpack
from finetune.export.checks import Report, quiet
from finetune.export.compare import TOLERANCE, answer, close, identical, mapped
from finetune.export.layers import Layer, applied, check
from finetune.export.read import Identity, read_tensors
from finetune.export.words import text_encoders
from finetune.family import ModelFamily

READERS = ("a1111",)


def check_file(
    report: Report, found: Identity, family: ModelFamily, against: Sequence[str], weights: Weights | None
) -> None:
    """Ask everything, the cheapest first; what needs the base model only where the file itself is sound."""
    tensors = read_tensors(found.path)
    report.run("finite", lambda: check(tensors), lambda _: f"{len(tensors)} tensors, none empty, NaN or infinite")
    held = report.run("keys", lambda: unpack(tensors), lambda held: f"words: {', '.join(held.words)}")
    if held is None:
        return
    read = report.run("layers", lambda: kohya.unpack(held.lora, family.export_names), lambda read: f"{len(read)}")
    if read is None or not report.passed:
        return
    if weights is not None:
        report.run("equal to memory", lambda: _same(tensors, weights, family))
    family.require("denoiser", *family.text_encoders)
    report.run("widths", lambda: _widths(held, family))
    for tool in against:
        report.run(tool, lambda tool=tool: mapped(tool, held.lora, found, READERS, family))  # type: ignore[misc]
    if report.passed:
        _check_loaded(report, found, family, held, read)


def _same(tensors: dict[str, Tensor], weights: Weights, family: ModelFamily) -> str:
    wanted = pack(*parts_of(weights, family.export_names), family.export_names, next(iter(tensors.values())).dtype)
    return identical(tensors, wanted)


def _widths(held: Parts, family: ModelFamily) -> str:
    vocabularies = family.sites.vocabularies
    widths = [int(_table(family.networks[one.network]).shape[1]) for one in vocabularies]
    for word, parts in held.words.items():
        found = [rows.shape[1] for rows in parts.values()]
        if found != widths:
            raise GuardError(f"{word} has vectors of {found} numbers, the words of the text encoders have {widths}")
    return f"{' and '.join(map(str, widths))}, as the words of the text encoders"


@torch.no_grad()
def _check_loaded(report: Report, found: Identity, family: ModelFamily, held: Parts, read: Sequence[Layer]) -> None:
    """Load the file as ``finetune sample`` does, and compare with arithmetic of our own."""
    networks = {name: family.networks[name] for name in family.export_names}
    base = answer(family)
    with applied(networks, read):
        wanted = answer(family)
    tolerance = TOLERANCE[next(iter(held.lora.values())).dtype]
    pipeline = family.pipeline()

    def load() -> str:
        with quiet():
            return ", ".join(load_bundle(pipeline, found.path))

    if report.run("diffusers: loads", load) is None:
        return
    report.run("diffusers: words arrive", lambda: _arrived(held, pipeline))
    report.run("diffusers: output", lambda: close(answer(family), wanted, base, tolerance))


def _arrived(held: Parts, pipeline: Any) -> str:
    readers = text_encoders(pipeline)
    for word, parts in held.words.items():
        for (encoder, tokenizer), rows in zip(readers.values(), parts.values(), strict=True):
            table = _table(encoder)
            ids = tokenizer(pipeline.maybe_convert_prompt(word, tokenizer), add_special_tokens=False).input_ids
            if len(ids) != len(rows) or not torch.equal(table[ids], rows.to(table)):
                raise GuardError(f"{word} is loaded with other vectors than the file's")
    return f"bit for bit: {', '.join(held.words)}"


def _table(encoder: Any) -> Tensor:
    table: Tensor = encoder.get_input_embeddings().weight
    return table
