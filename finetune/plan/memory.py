"""How much memory a process needs, counted on skeletons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapter import Adapter
from finetune.batch import Conditioning
from finetune.blocks import blocks_of
from finetune.config.memory import trains_base
from finetune.config.optimizer import ClassConfig
from finetune.config.schema import ImagesPrior, ModelPrior, Recipe
from finetune.family import ModelFamily
from finetune.plan.contents import Memory
from finetune.plan.simulation import inference_bytes, skeletal, step_bytes

LIBRARIES = 400 * 2**20  # bytes that Python, torch and the model libraries take before anything is loaded
FLOAT = 4  # bytes; what trains, its gradients and optimizer states are float32
GUIDED = 2  # prompts of a picture that is drawn: one to follow, one to go away from


def adaptation(networks: Mapping[str, int], encoders: Sequence[str]) -> Memory:
    """Bytes that drawing with an aesthetic embedding takes: the model, and a text encoder that follows each prompt.

    Args:
        networks: name -> parameters of the base.
        encoders: which of them read prompts.
    """
    moving = sum(networks[name] for name in encoders)
    parts = {
        "libraries": LIBRARIES,
        "weights": FLOAT * sum(networks.values()),
        "copy of the text encoder": FLOAT * moving,
        "gradients": FLOAT * moving,
        "adam states": 2 * FLOAT * moving,
    }
    formula = (
        f"4 bytes x parameters of {', '.join(sorted(networks))} + 16 bytes x {moving:,} of the text encoder's copy "
        "(weight, gradient, 2 optimizer states); the CLIP that sees the pictures and activations are not counted"
    )
    return Memory(parts=parts, formula=formula)


def estimate(recipe: Recipe, family: ModelFamily, adapter: Adapter, longest: str = "") -> Memory:
    """Bytes that a process holds at the most which has everything whole, alone or under DDP.

    In a step, part by part, and before and after the steps.

    Args:
        family: holds skeletons, with what will train attached. They are in ``train()`` afterwards.
        adapter: what trains.
        longest: caption, which all are taken to be as long as.
    """
    train, groups = recipe.train, adapter.groups()
    before = _encoding(recipe, family, longest)
    drawing = _drawing(recipe, family)
    held = networks_held(recipe, family)
    weights = sum(_bytes(family.networks[name]) for name in held)
    swapped, visiting = _swapped(recipe, family)
    trainable = FLOAT * sum(one.numel() for group in groups for one in group.parameters.values())
    states = state_bytes(recipe, adapter)
    pictures, peak = _step(recipe, family, longest)
    parts = {
        "libraries": LIBRARIES,
        "weights": weights - swapped,
        "blocks on their way": visiting,
        "gradients": trainable,
        f"{train.optimizer.name} states": states,
        "moving average": trainable if train.ema else 0,
        "untouched copy": trainable if trains_base(recipe) and isinstance(recipe.prior, ModelPrior) else 0,
        "set aside by the adapter": adapter.bytes_beside(),
        f"activations of {pictures} pictures": max(0, peak - trainable),
    }
    phases = {"encoding": LIBRARIES + before}
    if drawing:
        kept = states + (trainable if train.ema else 0) if recipe.samples.every else 0
        phases["drawing"] = LIBRARIES + drawing + kept - swapped + visiting
    counted = "not counted" if isinstance(train.optimizer, ClassConfig) else f"{states:,} bytes"
    formula = (
        f"weights of {', '.join(sorted(held))} as they are held + 4 bytes x {trainable // FLOAT:,} that train "
        f"(gradient) + {train.optimizer.name}'s states ({counted}) + the most that a forward and a backward pass of "
        f"{pictures} pictures hold beside these"
        + (", with blocks computed twice" if train.gradient_checkpointing else "")
        + (f", in {train.mixed_precision}" if train.mixed_precision != "no" else "")
    )
    return Memory(
        parts={name: size for name, size in parts.items() if size}, formula=formula, host=swapped, phases=phases
    )


def networks_held(recipe: Recipe, family: ModelFamily) -> set[str]:
    """Networks that are in memory while steps are taken: those of the model that are needed, and what a method adds."""
    released = set() if recipe.adapter.trains_text or not recipe.data.cache.text else set(family.text_encoders)
    released |= {"vae"} if recipe.data.cache.latents else set()
    return set(family.networks) - released


def state_bytes(recipe: Recipe, adapter: Adapter) -> int:
    """Bytes that the optimizer remembers of all that trains."""
    return sum(
        recipe.train.optimizer.state_bytes(one.shape, name in group.tables)
        for group in adapter.groups()
        for name, one in group.parameters.items()
    )


def _swapped(recipe: Recipe, family: ModelFamily) -> tuple[int, int]:
    """Bytes of the blocks that lie in the host's memory, and of those that visit: one computes, another comes."""
    wanted = recipe.model.block_swap
    blocks = list(blocks_of(family.networks["denoiser"]).values())[-wanted:] if wanted else []
    sizes = [_bytes(block, lambda parameter: not parameter.requires_grad) for block in blocks]
    return sum(sizes), sum(sorted(sizes)[-2:])


def _step(recipe: Recipe, family: ModelFamily, longest: str) -> tuple[int, int]:
    """How many pictures pass the denoiser in a step, and the most bytes that their passes hold, gradients included."""
    train, prior = recipe.train, recipe.prior
    if train.gradient_checkpointing:
        family.enable_gradient_checkpointing()
    family.networks.train()
    size = train.batch_size * (2 if isinstance(prior, ImagesPrior) and prior.layout == "pairwise" else 1)
    encoded = None if recipe.adapter.trains_text or not recipe.data.cache.text else _prompt(family, longest, size)

    def ask() -> Tensor:
        return _ask(family, _side(recipe), encoded or family.encode_prompt([longest] * size), size)

    def forward() -> Tensor:
        if not isinstance(prior, ModelPrior):
            return ask().square()
        error = ask().square()
        with torch.no_grad():
            target = ask()
        return error + (ask() - target).square()

    precision = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[train.mixed_precision]
    peak = step_bytes(family.networks, forward, precision, accumulated=train.gradient_accumulation_steps > 1)
    return size * (2 if isinstance(prior, ModelPrior) else 1), peak


def _encoding(recipe: Recipe, family: ModelFamily, longest: str) -> int:
    """The most that the networks hold which encode captions, and then pictures, one at a time."""
    vae, side = family.networks["vae"], _side(recipe)
    texts = [family.networks[name] for name in family.text_encoders]
    return max(
        sum(map(_bytes, texts)) + inference_bytes(family.networks, lambda: family.encode_prompt([longest])),
        _bytes(vae) + inference_bytes(vae, lambda: family.encode_image(torch.empty(1, 3, side, side))),
    )


def _drawing(recipe: Recipe, family: ModelFamily) -> int:
    """The most that a whole pipeline holds while it draws; 0 where nothing is drawn."""
    if not (recipe.report.enabled or recipe.samples.every or isinstance(recipe.prior, ImagesPrior)):
        return 0
    vae: Any = family.networks["vae"]
    side, pictures = recipe.data.resolution, 1
    if isinstance(recipe.prior, ImagesPrior) and recipe.prior.folder is None:
        pictures = recipe.prior.batch_size
    cells, prompt = _latents(family, pictures, side), _prompt(family, "", GUIDED * pictures)
    denoised = inference_bytes(family.networks, lambda: _ask(family, side, prompt, GUIDED * pictures))
    decoded = inference_bytes(vae, lambda: vae.decode(torch.empty(cells, dtype=vae.dtype)))
    return sum(map(_bytes, family.networks.values())) + max(denoised, decoded)


def _latents(family: ModelFamily, pictures: int, side: int) -> torch.Size:
    """The shape that the autoencoder itself has latents in; to some of them a picture is a film of one frame."""
    vae: Any = family.networks["vae"]
    shapes: list[torch.Size] = []

    def encode(pixels: Tensor) -> Any:
        found = plain(pixels)
        shapes.append((found.latent_dist.mean if hasattr(found, "latent_dist") else found.latent).shape)
        return found

    plain, vae.encode = vae.encode, encode
    try:
        with skeletal():
            family.encode_image(torch.empty(pictures, 3, side, side))
    finally:
        del vae.encode
    return shapes[0]


def _side(recipe: Recipe) -> int:
    return max(recipe.data.resolution, *recipe.data.more_resolutions, 0)


def _prompt(family: ModelFamily, caption: str, size: int) -> Conditioning:
    with skeletal(), torch.no_grad():
        return family.encode_prompt([caption] * size)


def _ask(family: ModelFamily, side: int, prompt: Conditioning, size: int) -> Tensor:
    cells = side // family.latent_scale
    noisy = torch.empty(size, family.latent_channels, cells, cells)
    return family.predict(noisy, torch.zeros(size), prompt, torch.zeros(size, 6))


def _bytes(module: nn.Module, wanted: Callable[[nn.Parameter], bool] = lambda _: True) -> int:
    parameters = sum(one.nbytes for one in module.parameters() if wanted(one))
    return parameters + sum(one.nbytes for one in module.buffers())
