"""Custom Diffusion's weights: those that read the prompt, without what they make of the start token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finetune.adapters import attach
from finetune.adapters.full import Full
from finetune.batch import Conditioning
from finetune.config.adapters import FullConfig
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import load_family
from finetune.family import ModelFamily, Unsupported
from finetune.randomness import generator

GEOMETRY = torch.zeros(1, 6, dtype=torch.int64)


def attached(folder: Path, detach_start: bool = True) -> tuple[ModelFamily, Full]:
    family = load_family(ModelConfig(path=str(folder)))
    adapter = attach(FullConfig(kind="full", select="cross-kv", detach_start=detach_start), family, 0)
    assert isinstance(adapter, Full)
    return family, adapter


def answer(family: ModelFamily, tokens: Tensor) -> Tensor:
    noisy = torch.randn(1, 4, 8, 8, generator=generator(0, "noisy"))
    return family.predict(noisy, torch.tensor([300]), Conditioning(tokens=tokens), GEOMETRY)


def question(length: int = 24) -> Tensor:
    return torch.randn(1, length, 16, generator=generator(0, "tokens"))


@contextmanager
def watched(family: ModelFamily) -> Iterator[dict[str, Tensor]]:
    """What each key or value layer itself makes of the prompt, before anything is detached."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name, layer in family.networks["denoiser"].named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):

            def keep(_: object, inputs: object, output: Tensor, name: str = name) -> None:
                output.retain_grad()
                seen[name] = output

            handles.append(layer.register_forward_hook(keep, prepend=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def test_gradient_at_the_start_token_is_zero_and_elsewhere_not(tiny_sd: Path) -> None:
    """METHODS 6.4: the gradient of the loss w.r.t. k at position 0 is zero."""
    family, _ = attached(tiny_sd)
    with watched(family) as seen:
        answer(family, question()).square().mean().backward()
    assert len(seen) == 8
    for name, output in seen.items():
        assert output.grad is not None
        assert not bool(output.grad[:, 0].any()), name
        assert bool(output.grad[:, 1:].any()), name


def test_a_prompt_of_the_start_token_alone_teaches_nothing(tiny_sd: Path) -> None:
    """METHODS 6.4: BOS-only prompt gives zero k/v gradient."""
    for detached in (True, False):
        family, adapter = attached(tiny_sd, detached)
        loss = answer(family, question(1)).square().mean() + 0 * sum(p.sum() for p in adapter.parameters.values())
        loss.backward()
        grown = [bool(p.grad.any()) for p in adapter.parameters.values() if p.grad is not None]
        assert len(grown) == 8
        if detached:
            assert not any(grown)
        else:
            assert any(grown), "otherwise the test could not fail"


def test_the_start_token_passes_no_gradient_to_the_prompt_through_keys_and_values(tiny_sd: Path) -> None:
    """What a new word learns does not come through the start token either."""
    family, _ = attached(tiny_sd)
    tokens = question().requires_grad_(True)
    answer(family, tokens).square().mean().backward()
    assert tokens.grad is not None
    assert not bool(tokens.grad[:, 0].any())
    assert bool(tokens.grad[:, 1:].any())


def test_answers_are_bit_equal_with_and_without(tiny_sd: Path) -> None:
    plain, _ = attached(tiny_sd, False)
    detached, adapter = attached(tiny_sd, True)
    assert torch.equal(answer(plain, question()), answer(detached, question()))
    with torch.no_grad():
        inside = answer(detached, question())
        with adapter.disabled():
            assert torch.equal(answer(detached, question()), inside)
    assert adapter.weights().settings["detach_start"] == "true"


def test_other_gradients_differ_only_by_the_start_token(tiny_sd: Path) -> None:
    """The whole gradient is what the other positions give plus what the start token gave."""
    (plain, one), (detached, other) = attached(tiny_sd, False), attached(tiny_sd, True)
    for family in (plain, detached):
        answer(family, question()).square().mean().backward()
    # the last block's keys: only there is what flows back the same in both
    name = "denoiser.up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_v.weight"
    with watched(plain) as seen:
        answer(plain, question()).square().mean().backward()
        start = seen[name.removeprefix("denoiser.").removesuffix(".weight")].grad
    assert start is not None
    share = start[0, 0][:, None] * question()[0, 0][None]
    whole, rest = one.parameters[name].grad, other.parameters[name].grad
    assert whole is not None and rest is not None
    torch.testing.assert_close(whole / 2, rest + share, rtol=1e-4, atol=1e-7)  # backward ran twice on it


def test_an_architecture_that_reads_no_prompt_so_is_refused(tiny_sd: Path) -> None:
    from dataclasses import replace

    family = load_family(ModelConfig(path=str(tiny_sd)))
    family.sites = replace(family.sites, readers=Unsupported("its layers read prompt and picture together"))
    with pytest.raises(UserError, match=r"detach_start.*read prompt and picture together"):
        attach(FullConfig(kind="full", select="cross-kv", detach_start=True), family, 0)
