"""Pictures from an exported adapter: the file itself is loaded, by diffusers' own loader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from finetune.adapter import Weights
from finetune.config.schema import ModelConfig, Recipe, SamplerConfig
from finetune.export.base import load_base
from finetune.export.kinds import asked, kind, wanted
from finetune.export.kinds.full import put
from finetune.export.metadata import sampling
from finetune.export.read import Identity, pieces
from finetune.family import ModelFamily
from finetune.sampling import draw


def sample(
    adapter: Path,
    prompts: Sequence[str],
    *,
    base: str | None = None,
    seed: int = 0,
    strength: float = 1.0,
    sampler: SamplerConfig | None = None,
    count: int = 1,
    resolution: int | None = None,
    prompt_chunks: int | None = None,
    negative: str = "",
    held: ModelConfig | None = None,
) -> list[Image.Image]:
    """Draw ``count`` pictures of each prompt, in that order.

    On a CPU they are, bit for bit, what ``StableDiffusionPipeline.from_pretrained(base)`` draws after
    ``load_lora_weights(adapter)`` with the same settings and ``finetune.randomness.generator(seed, "sample", i, j)``
    for picture ``j`` of prompt ``i``; a prompt of several chunks, which diffusers would cut, as A1111 reads it.

    Args:
        adapter: a LoRA file, a model folder or a run's folder.
        base: as in a recipe's ``model.path``; what the file says where it is not given.
        strength: how much the LoRA counts; 0 is the base, 1 what was trained.
        sampler: steps, guidance, scheduler.
        resolution: side in pixels; the model's own where it is not given.
        prompt_chunks: as in a recipe's ``model``; what the file says where it is not given.
        negative: what guidance leads away from.
        held: a recipe's ``model``, where the base shall lie in memory as it does there; else all of it is float32.

    Raises:
        UserError: there is no such adapter or base, diffusers cannot load the file, or a strength was asked of a
            whole model.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    family = adapted(adapter, base, strength, device, prompt_chunks, held)
    return draw(family, prompts, count, sampler or SamplerConfig(), seed, resolution=resolution, negative=negative)


def adapted(
    adapter: Path,
    base: str | None = None,
    strength: float = 1.0,
    device: torch.device | str = "cpu",
    prompt_chunks: int | None = None,
    held: ModelConfig | None = None,
) -> ModelFamily:
    """The base with an exported file, or all that a run exported, loaded; arguments and errors as in ``sample``.

    What is added to the weights themselves, as differences are, needs them whole: ``held.quantize`` is then left out.
    """
    found = pieces(adapter)
    if held and any(map(_in_weights, found)):
        held = held.model_copy(update={"quantize": None})
    family = load_base(found[0], base, prompt_chunks, held)
    family.device = torch.device(device)
    return _with(family, found, strength, len({one.kind for one in found}))


def as_exported(
    parts: Sequence[Weights], twin: ModelFamily, recipe: Recipe, folder: Path, strength: float = 1.0
) -> ModelFamily:
    """The base with what would be exported now, loaded as ``adapted`` loads it, bit for bit.

    Adapters are really written, in the one layout that ``adapted`` would choose, and read again. Whole weights, which
    are as large as the model, are only rounded as their files would be.

    Args:
        parts: trained weights, those of each part of an adapter.
        twin: the base, which others may share the weights of; becomes what is returned.
        recipe: ``export`` and the headers' facts are read.
        folder: empty, for files that nobody needs once this has returned.
        strength: as of ``adapted``; 1 for whole weights.
    """
    whole = [weights for weights in parts if weights.kind == "full"]
    apart = [weights for weights in parts if weights.kind not in ("full", "pivotal")]
    written = [path for weights in apart for path in _first(weights, twin, recipe, folder)]
    if not written and not whole:  # a bundle alone
        written = [path for weights in parts for path in _first(weights, twin, recipe, folder)]
    found = pieces(folder) if written else []
    if twin.model.quantize and any(map(_in_weights, found)):
        twin = _whole(found[0], twin, recipe)
    twin.sampling = twin.sampling if whole else sampling(found[0].metadata)
    for weights in whole:
        put(twin.networks, weights, recipe)
    return _with(twin, found, strength, len({one.kind for one in found}) + len(whole))


def _in_weights(piece: Identity) -> bool:
    """Whether a file is added to the weights themselves, which then may not be packed."""
    return piece.layout == "difference" or (piece.kind, piece.layout) == ("lycoris", "kohya")


def _whole(piece: Identity, twin: ModelFamily, recipe: Recipe) -> ModelFamily:
    """The base of ``twin`` as it is on disk but for its dtype."""
    held = recipe.model.model_copy(update={"quantize": None})
    family = load_base(piece, recipe.model.path, recipe.model.prompt_chunks, held)
    family.device = twin.device
    return family


def _first(weights: Weights, family: ModelFamily, recipe: Recipe, folder: Path) -> list[Path]:
    """Write the layout that is drawn with where there are several."""
    writing = kind(weights.kind)
    method = weights.settings.get("algorithm", weights.kind)
    formats = wanted(recipe, method, writing.LAYOUTS)[:1] or asked(recipe, method) or ()
    export = recipe.export.model_copy(update={"formats": list(formats), "tools": None})
    return writing.write(weights, family, recipe.model_copy(update={"export": export}), folder)


def _with(family: ModelFamily, found: Sequence[Identity], strength: float, kinds: int) -> ModelFamily:
    """``family`` with files loaded into its pipeline; ``kinds`` are those of all that is loaded."""
    pipeline = family.pipeline()
    for piece in found:
        beside = piece.kind == "embedding" and kinds > 1  # words are used or not
        kind(piece.kind).apply(pipeline, piece, 1.0 if beside else strength)
    family.networks.to(family.device)  # what was added lies beside the weights, which may be swapped
    # what a file changes of the pipeline itself, and not of its networks, has to stay
    family.pipeline = lambda: pipeline  # type: ignore[method-assign]
    return family
