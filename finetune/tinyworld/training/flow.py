"""The denoiser of the flow-matching base: SD 3's transformer of two streams, as small as the room for it.

Trained on straight lines from picture to noise (Esser et al. 2024, https://arxiv.org/abs/2403.03206).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from finetune.tinyworld.training import latents, prompts
from finetune.tinyworld.training.fit import Plan, fit
from finetune.tinyworld.training.unet import strata

WITHOUT_T5 = 256
"""Zeros that SD 3's pipeline puts behind the prompt where there is no T5."""


def build(heads: int = 4, blocks: int = 3) -> SD3Transformer2DModel:
    """The untrained denoiser for latents (B, 4, 16, 16): every block begins as the identity (adaLN-Zero, DiT)."""
    width = heads * 16
    denoiser = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=blocks,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=2 * 128,
        caption_projection_dim=width,
        pooled_projection_dim=2 * 64,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    for name, layer in denoiser.named_modules():
        if isinstance(layer, nn.Linear) and (".norm1" in name or name in ("norm_out.linear", "proj_out")):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    nn.init.normal_(denoiser.context_embedder.weight, std=0.015)  # the text encoder's states are 4 wide
    return denoiser


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps, evenly spaced: so few tokens need no shift towards noise."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)


class Counted(TorchFunctionMode):
    """Inside, the last token that attention looks at counts ``times`` times.

    Without a T5 there are 256 zeros behind each prompt. They have no positions, so they stay equal in every layer, and
    one of them that counts for all gives the same answer in a fourth of the time.
    """

    def __init__(self, tokens: int, times: int) -> None:
        super().__init__()
        self.bias = torch.zeros(1, tokens)
        self.bias[0, -1] = math.log(times)

    def __torch_function__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        """Everything but attention is passed on as it is."""
        if function is F.scaled_dot_product_attention:
            query = given[0]
            named = {**(named or {}), "attn_mask": self.bias.to(query.dtype).expand(query.shape[-2], -1)}
        return function(*given, **(named or {}))


def answer(denoiser: nn.Module, noisy: Tensor, times: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
    """What the pipeline's call of the denoiser gives, (B, 4, 16, 16), both text encoders being one.

    Args:
        times: ``1000 * sigma`` (B,).
        states: of one text encoder, (B, 24, 128).
        pooled: of one text encoder, (B, 64).
    """
    context = F.pad(torch.cat([states, states], -1), (0, 0, 0, 1))
    with Counted(noisy[0, 0].numel() // 4 + context.shape[1], WITHOUT_T5):
        found: Tensor = denoiser(noisy, context, torch.cat([pooled, pooled], -1), times, return_dict=False)[0]
    return found


def velocity_loss(
    denoiser: nn.Module, clean: Tensor, states: Tensor, pooled: Tensor, generator: torch.Generator
) -> Tensor:
    """Squared error of ``eps - x0``; times are logit-normal, a stratum for each sample.

    Args:
        clean: scaled latents float (B, 4, 16, 16).
        states, pooled: as of ``answer``.
    """
    sigma = torch.sigmoid(torch.special.ndtri(strata(len(clean), generator).clamp(1e-6, 1 - 1e-6)))
    noise = torch.randn(clean.shape, generator=generator)
    noisy = clean.lerp(noise, sigma[:, None, None, None])
    return (answer(denoiser, noisy, 1000 * sigma, states, pooled) - (noise - clean)).square().mean()


def train(folder: Path, steps: int, batch: int, seed: int) -> None:
    """Train to ``folder/model`` on the latents and prompts beside ``folder``."""
    mean, logvar, scale = latents.load(folder.parent / "flow-latents")
    states, pooled = prompts.load(folder.parent / "flow-prompts")
    torch.manual_seed(seed)
    denoiser: Any = build().train()

    def loss_of(network: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(mean), (batch,), generator=generator)
        said = rows * prompts.WORDINGS + torch.randint(prompts.WORDINGS, (batch,), generator=generator)
        clean = latents.sampled(mean, logvar, rows, generator) * scale
        return velocity_loss(network, clean, states[said].float(), pooled[said].float(), generator)

    plan = Plan(steps, 2e-3, warmup=200, hold=0.5, average=0.999, seed=seed, save_every=500)
    averaged: Any = fit(denoiser, loss_of, plan, folder)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        averaged.save_pretrained(folder / "model")
