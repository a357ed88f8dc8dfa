"""How much memory a training process needs, counted from shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from finetune.adapter import ParameterGroup
from finetune.config.adapters import FullConfig, PivotalConfig
from finetune.config.optimizer import ClassConfig
from finetune.config.schema import ImagesPrior, ModelPrior, Recipe
from finetune.family import ModelFamily
from finetune.plan.contents import Memory
from finetune.plan.skeleton import activations

LIBRARIES = 400 * 2**20  # bytes that Python, torch and the model libraries take before anything is loaded
FLOAT = 4  # bytes; weights, gradients and optimizer states are float32


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


def estimate(
    recipe: Recipe,
    family: ModelFamily,
    networks: Mapping[str, int],
    groups: Sequence[ParameterGroup],
    processes: int = 1,
    longest: str = "",
) -> Memory:
    """Bytes that one process holds in the middle of a step, after what is encoded ahead has been freed.

    Args:
        family: holds skeletons, with what will train attached.
        networks: name -> parameters of the base.
        groups: what trains.
        processes: more than one keep a second copy of the gradients, to send.
        longest: caption, which all are taken to be as long as.
    """
    train, adapter, cache, prior = recipe.train, recipe.adapter, recipe.data.cache, recipe.prior
    held = {"denoiser"}
    held |= set(family.text_encoders) if adapter.trains_text or not cache.text else set()
    held |= set() if cache.latents else {"vae"}
    trainable = sum(one.numel() for group in groups for one in group.parameters.values())
    states = sum(
        train.optimizer.state_bytes(one.shape, name in group.tables)
        for group in groups
        for name, one in group.parameters.items()
    )
    pairwise = isinstance(prior, ImagesPrior) and prior.layout == "pairwise"
    passes = 2 if pairwise or isinstance(prior, ModelPrior) else 1
    batch = train.batch_size * passes
    side = max(recipe.data.resolution, *recipe.data.more_resolutions, 0)
    kept = activations(family, side, batch, train.gradient_checkpointing, longest)
    if train.mixed_precision != "no":
        kept //= 2
    whole = isinstance(adapter.weights if isinstance(adapter, PivotalConfig) else adapter, FullConfig)
    added = 0 if whole else trainable
    parts = {
        "libraries": LIBRARIES,
        "weights": FLOAT * (sum(networks[name] for name in held) + added),
        "gradients": FLOAT * trainable * (2 if processes > 1 else 1),
        f"{train.optimizer.name} states": states,
        "moving average": FLOAT * trainable if train.ema else 0,
        "untouched copy": FLOAT * trainable if whole and isinstance(prior, ModelPrior) else 0,
        f"activations of {batch} pictures": kept,
    }
    per = 4 * (1 + (processes > 1) + (train.ema is not None))
    counted = "not counted" if isinstance(train.optimizer, ClassConfig) else f"{states:,} bytes"
    formula = (
        f"4 bytes x parameters of {', '.join(sorted(held))} + {per} bytes x {trainable:,} that train "
        f"(gradient{', average' if train.ema else ''}) + {train.optimizer.name}'s states ({counted}) "
        f"+ what autograd keeps of a forward pass of {batch} pictures"
        + (", without the block that checkpointing computes again" if train.gradient_checkpointing else "")
        + (", halved for mixed precision" if train.mixed_precision != "no" else "")
    )
    return Memory(parts={name: size for name, size in parts.items() if size}, formula=formula)
