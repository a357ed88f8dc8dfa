"""All training pictures through the autoencoder once: mean and logvar in memory, so the denoiser never sees a pixel."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.tinyworld.training import data

Module = TypeVar("Module", bound=nn.Module)


def encode(folder: Path, autoencoder: Path, workers: int = 2) -> None:
    """Write ``folder/latents.safetensors`` (mean and logvar, float16 (N, 4, 16, 16)) and the factor that scales them.

    The scaling factor is one over the standard deviation of sampled latents, as in Rombach et al. 2022.
    """
    scenes = data.training_scenes(folder.parent / "data")
    share = -(-len(scenes) // workers)
    tasks = [(folder.parent / "data", autoencoder, at * share, (at + 1) * share) for at in range(workers)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(_encode, tasks))
    mean, logvar = (torch.cat([torch.from_numpy(part[at]) for part in parts]) for at in range(2))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    spread = (mean.float() + (0.5 * logvar.float()).exp() * noise).std()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"mean": mean, "logvar": logvar, "scale": (1 / spread)[None]}, folder / "latents.safetensors")


@torch.no_grad()
def _encode(task: tuple[Path, Path, int, int]) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    pictures_at, autoencoder, start, stop = task
    torch.set_num_threads(1)
    pictures = data.training_scenes(pictures_at).pictures[start:stop]
    vae: Any = rounded(AutoencoderKL.from_pretrained(autoencoder)).eval()
    means, logvars = [], []
    for at in range(0, len(pictures), 50):
        some = torch.from_numpy(pictures[at : at + 50].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = vae.encode(some.contiguous(memory_format=torch.channels_last)).latent_dist
        means.append(posterior.mean.half())
        logvars.append(posterior.logvar.half())
    return torch.cat(means).contiguous().numpy(), torch.cat(logvars).contiguous().numpy()


def sampled(mean: Tensor, logvar: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Latents of some scenes, unscaled, float32 (B, 4, 16, 16), drawn from what the autoencoder says of each."""
    noise = torch.randn(len(rows), *mean.shape[1:], generator=generator)
    return mean[rows].float() + (0.5 * logvar[rows].float()).exp() * noise


def rounded(model: Module) -> Module:
    """The model with every weight rounded to what float16 can hold: the weights as shipped, computed in float32."""
    return model.half().float()  # type: ignore[no-any-return]


def load(folder: Path) -> tuple[Tensor, Tensor, float]:
    """Mean and logvar, float16 (N, 4, 16, 16), unscaled, and the scaling factor."""
    stored = load_file(folder / "latents.safetensors")
    return stored["mean"], stored["logvar"], round(float(stored["scale"]), 4)
