"""Pictures that name themselves, and a family small enough to follow by eye."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.batch import Conditioning, Posterior
from finetune.config.schema import Recipe
from finetune.family import ExportNames
from finetune.randomness import generator

SIDE = 16


class Pipe:
    """Draws noise from the generators it is given, and remembers what it was asked."""

    scheduler = None

    def __init__(self, family: Fake) -> None:
        self.family = family

    def set_progress_bar_config(self, **_: Any) -> None:
        pass

    def __call__(self, prompt: list[str], generator: list[torch.Generator], height: int, width: int, **_: Any) -> Any:
        self.family.drawn.append(len(prompt))
        arrays = [torch.randint(0, 256, (height, width, 3), generator=rng).byte().numpy() for rng in generator]
        return type("Output", (), {"images": [Image.fromarray(array) for array in arrays]})()


class Fake:
    """A family whose latents are the picture at half size, so that a test can read the picture from them."""

    name = "fake"
    source = "fake"
    latent_scale = 2
    pixel_multiple = 4
    prompt_chunks = 1
    text_encoders = ("text_encoder",)
    export_names: ClassVar = {"denoiser": ExportNames("unet", "lora_unet")}

    def __init__(self, weights: str = "a", words: int = 12) -> None:
        self.weights, self.words = weights, words
        self.networks = nn.ModuleDict()
        self.sampling: dict[str, Any] = {}
        self.pictures = 0  # encoded
        self.captions: list[str] = []  # encoded
        self.drawn: list[int] = []  # sizes of the batches that the pipeline was asked for
        self.together: set[frozenset[str]] = set()  # networks that were in memory at the same time

    def require(self, *networks: str) -> None:
        for network in networks:
            if network not in self.networks:
                self.networks[network] = nn.Linear(2, 2).requires_grad_(False)
        self.together.add(frozenset(self.networks))

    def release(self, *networks: str) -> None:
        for network in networks:
            if network in self.networks:
                del self.networks[network]

    def fingerprint(self, *networks: str) -> str:
        return f"{self.weights} {sorted(networks)}"

    def encode_image(self, pixels: Tensor) -> Posterior:
        assert "vae" in self.networks
        self.pictures += len(pixels)
        mean = F.avg_pool2d(pixels, 2)
        return Posterior(mean=mean, logvar=mean - 3)

    def encode_prompt(self, captions: Sequence[str]) -> Conditioning:
        assert "text_encoder" in self.networks
        self.captions += captions
        return Conditioning(tokens=torch.stack([torch.randn(4, 3, generator=generator(0, text)) for text in captions]))

    def caption_overflow(self, caption: str, words: dict[str, int] | None = None) -> int:
        added = sum((vectors - 1) * caption.count(word) for word, vectors in (words or {}).items())
        return max(0, len(caption.split()) + added - self.words)

    def guided(self, scale: float, prompts: int = 1) -> dict[str, Any]:
        return {"guidance_scale": scale}

    def prompt_length(self, caption: str, words: dict[str, int] | None = None) -> int:
        return 4

    def pipeline(self) -> Pipe:
        self.require("denoiser", "vae", "text_encoder")
        return Pipe(self)


@pytest.fixture
def fake() -> type[Fake]:
    """Make a family: ``fake()``, or ``fake("b")`` for one with other weights."""
    return Fake


def plain(index: int, size: tuple[int, int] = (24, 24)) -> Image.Image:
    """A picture whose red says its index: 20 per step."""
    return Image.new("RGB", size, (20 * index, 128, 255 - 20 * index))


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Write ``count`` pictures of one colour each, with captions that name their index unless ``captions`` is False."""

    def write(count: int = 5, name: str = "photos", captions: bool = True) -> Path:
        path = tmp_path / name
        path.mkdir()
        for index in range(count):
            plain(index).save(path / f"{index}.png")
            if captions:
                (path / f"{index}.txt").write_text(f"a photo of zib number {index}\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def make_recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe over the given concept folders; ``data``, ``train``, ``prior`` and ``concept`` add keys."""

    def make(
        *folders: Path,
        data: dict[str, Any] | None = None,
        train: dict[str, Any] | None = None,
        prior: dict[str, Any] | None = None,
        concept: dict[str, Any] | None = None,
        **keys: Any,
    ) -> Recipe:
        concepts = [{"folder": str(path), "class_prompt": "a star", **(concept or {})} for path in folders]
        cache = {"folder": str(tmp_path / "cache"), **(data or {}).pop("cache", {})}
        return Recipe.model_validate(
            {
                "recipe": "dreambooth",
                "output": "run",
                "adapter": {"kind": "lora"},
                "data": {"concepts": concepts, "resolution": SIDE, "cache": cache, **(data or {})},
                "train": train or {},
                "prior": prior or {"kind": "none"},
                **keys,
            }
        )

    return make


@pytest.fixture
def gradient() -> Image.Image:
    """40 x 20 pixels: red grows to the right, green downwards."""
    right, down = np.meshgrid(np.linspace(0, 255, 40), np.linspace(0, 255, 20))
    return Image.fromarray(np.stack([right, down, 0 * right], -1).round().astype(np.uint8))


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("finetune").setLevel(logging.WARNING)
