"""The border between a published architecture and everything else in this toolkit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from finetune.batch import Conditioning, Posterior
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.objective import Objective
from finetune.objectives import Process
from finetune.originals import Places

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image


@dataclass(frozen=True)
class Unsupported:
    """Stands where a site would be, and says why there is none."""

    reason: str


def without_hypernetworks(readers: tuple[str, str] | Unsupported, denoiser: str) -> str | None:
    """Why hypernetworks have no place in a model; None where they have.

    Args:
        readers: as in ``Sites``.
        denoiser: what its pipeline calls it.
    """
    if isinstance(readers, Unsupported):
        return readers.reason
    return None if denoiser == "unet" else "hypernetworks are files for the layers of a U-Net, and it has none"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and the network whose embedding table it indexes.

    Attributes:
        words: new words in captions -> the tokens that now stand for each, of those that ``add`` made.
    """

    tokenizer: Any
    network: str
    words: dict[str, list[str]] = field(default_factory=dict)

    def add(self, word: str, vectors: int) -> list[int]:
        """Make ``word`` a token, and ``<word>_1``, ``<word>_2``, ... those of its further vectors. Returns their ids.

        Raises:
            UserError: the tokenizer knows one of them already, or mistakes one for another word.
        """
        tokens = [word, *(f"{word}_{place}" for place in range(1, vectors))]
        for token in tokens:
            pieces = self.tokenizer(token, add_special_tokens=False).input_ids
            if len(pieces) == 1 or token in self.tokenizer.get_vocab():
                raise UserError(f"{token!r} is a word that the model knows; a new one is written like '<{word}>'")
        if mistaken := [known for known in self.words if known in word or word in known]:
            raise UserError(f"{word!r} cannot be told from {mistaken[0]!r}; neither may be part of the other")
        ids = add_tokens(self.tokenizer, tokens)
        if self.tokenizer(" ".join(tokens), add_special_tokens=False).input_ids != ids:
            raise UserError(f"{word!r} cannot be told from another word; choose one that no other is part of")
        self.words[word] = tokens
        return ids

    def expand(self, caption: str) -> str:
        """``caption`` with all tokens of its new words, as diffusers' ``maybe_convert_prompt`` has it in pipelines."""
        for word, tokens in self.words.items():
            caption = caption.replace(word, " ".join(tokens))
        return caption


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Make ``tokens`` known to a tokenizer, and return their ids.

    Where a tokenizer keeps spaces they take those before them with them: one would stand between all of them. They are
    looked for before it makes letters of spaces.
    """
    from transformers import AddedToken

    keeps = bool(tokenizer(" ", add_special_tokens=False).input_ids)
    tokenizer.add_tokens([AddedToken(token, lstrip=keeps, normalized=not keeps) for token in tokens])
    ids: list[int] = tokenizer.convert_tokens_to_ids(list(tokens))
    return ids


def pool_at_end(encoder: Any, tokenizer: Any) -> None:
    """Let a CLIP text encoder take its pooled answer at the end of the text.

    Published settings name another token, and transformers then takes the place of the highest id: that of a new word.
    """
    for part in (encoder, getattr(encoder, "text_model", encoder)):
        if hasattr(part, "eos_token_id"):
            part.eos_token_id = part.config.eos_token_id = tokenizer.eos_token_id


@dataclass(frozen=True)
class SharedSpace:
    """The CLIP that a text encoder was taken from: text and pictures become vectors that can be compared.

    Attributes:
        name: of the CLIP, a hub name or a folder.
        encoder: hex digest of the text encoder that it belongs to.
        projection: float32 [d, width], from the encoder's state at the end of a text to the space.
        embed: pictures of any size to vectors of the space, float32 [N, d], their lengths left as they are.
    """

    name: str
    encoder: str
    projection: Tensor
    embed: Callable[[Sequence[Image.Image]], Tensor]


@dataclass(frozen=True)
class Sites:
    """Where methods may attach: names of modules and parameters inside ``ModelFamily.networks``.

    Attributes:
        linears: preset -> network -> regular expressions that must match a whole module path; for low-rank adapters.
        selections: preset -> network -> regular expressions searched in a parameter's name; for partial fine-tuning.
        readers: endings of the denoiser's key and value layers that read the prompt; for hypernetworks and Custom
            Diffusion.
        vocabularies: tokenizers and their embedding tables; for textual inversion.
        shared_space: finds the space that the text encoder shares with pictures, given the name of its CLIP where the
            family cannot know it; for aesthetic embeddings.
        unread: network -> regular expressions searched in names of what nothing reads: a text encoder's last layer
            where the denoiser is given the state before it. It would never learn, so methods leave it out.
    """

    linears: Mapping[str, Mapping[str, Sequence[str]]]
    selections: Mapping[str, Mapping[str, Sequence[str]]]
    readers: tuple[str, str] | Unsupported
    vocabularies: Sequence[Vocabulary]
    shared_space: Callable[[str | None], SharedSpace] | Unsupported = Unsupported(
        "no CLIP is known that its prompts and pictures have in common"
    )
    unread: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Text encoders whose layers train where a recipe asks for it: those that the presets know."""
        return tuple(name for name in next(iter(self.linears.values())) if name != "denoiser")

    def read(self, network: str, names: Iterable[str]) -> list[str]:
        """Those of a network's ``names`` that have a part in the denoiser's answer."""
        patterns = self.unread.get(network, ())
        return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]


KOHYA = ("kohya", "difference", "bundle")
"""Layouts whose keys are kohya's."""


@dataclass(frozen=True)
class ExportNames:
    """What a network of a family is called in adapter files.

    Attributes:
        diffusers: component in diffusers' LoRA files ("unet", "text_encoder").
        kohya: prefix in kohya's files ("lora_unet", "lora_te"), or "" where no layout of theirs is written for the
            family: ``finetune.originals.tables`` says why.
        missing_level: a level that other tools expect in front of every path and that the installed transformers has
            dropped ("text_model."), or "".
        words: what files of new words call a text encoder's rows in a model with several: "clip_l", "clip_g", "t5xxl".
        places: where kohya's files have layers that they do not call as diffusers does, a table of
            ``finetune.originals``; empty where the names are diffusers' own.
        unread_by: tools that read no file of kohya's naming that is for this network, though they do for others.
        single_file: of a denoiser, whether its model is written as one file (``finetune.export.single_file``).
    """

    diffusers: str
    kohya: str = ""
    missing_level: str = ""
    words: str = ""
    places: Places = field(default_factory=dict)
    unread_by: tuple[str, ...] = ()
    single_file: bool = False


@dataclass(frozen=True)
class Published:
    """What headers of adapter files call the models that they are for.

    Attributes:
        architecture: ModelSpec's: "stable-diffusion-xl-v1-base"; of a size that was never published the family's with
            "-custom" behind it.
        version: kohya's ``ss_base_model_version``: "sdxl_base_v1-0", or "".
        shelf: under which A1111 and Forge list it: "SDXL".
        code: ModelSpec's implementation, whose names layers have in files of kohya's layout.
    """

    architecture: str = "stable-diffusion-custom"
    version: str = ""
    shelf: str = "Other"
    code: str = "diffusers"


def writable(layouts: Sequence[str], names: Mapping[str, ExportNames]) -> tuple[str, ...]:
    """Those of ``layouts`` that a family of these names has: without kohya's names none that is made of them, no bundle
    where A1111, its only reader, has no such model, and no single file where none is known.
    """
    called = names["denoiser"]
    lacking = {*(() if called.kohya else KOHYA), *(("bundle",) if "a1111" in called.unread_by else ())}
    lacking |= set() if called.single_file else {"single-file"}
    return tuple(layout for layout in layouts if layout not in lacking)


class ModelFamily(Protocol):
    """One published architecture: how its parts are loaded, fed, asked and named.

    Parts are loaded by ``require`` and freed by ``release`` so that not all of them need be in memory at once. Every
    network is frozen and in ``eval()`` when loaded; a method unfreezes or adds what it trains, always inside
    ``networks``. The denoiser takes and answers float32 whatever its dtype.
    """

    name: ClassVar[str]
    networks: nn.ModuleDict  # what is in memory: "denoiser", "vae", "text_encoder", ...
    process: Process  # what its base was trained to undo
    objective: Objective  # that, refined by the recipe
    sampling: Mapping[str, Any]  # settings of its pipeline's scheduler that training changes; set from the objective
    sites: Sites
    export_names: Mapping[str, ExportNames]  # network -> names
    published: Published  # what files' headers call it
    text_encoders: Sequence[str]  # names of the networks that read prompts
    components: Mapping[str, str]  # network -> its folder, which is also its name in diffusers' pipelines
    pixel_multiple: int  # image sides must divide by this
    latent_scale: int  # pixels per latent cell along a side
    latent_channels: int  # numbers per latent cell, as the autoencoder has them
    source: str  # what a recipe's model.path calls the model
    folder: Path  # where its files are on this machine; diffusers pipelines load from it
    device: torch.device  # where required networks are put; the CPU unless it is set
    model: ModelConfig  # how networks lie in memory; nothing special unless it is set
    guidance: float | None  # what a guidance-distilled denoiser is told in training; None where it is told nothing
    prompt_chunks: int  # how often over a prompt may fill what a text encoder reads at a time; 1 unless it is set

    def require(self, *networks: str) -> None:
        """Load the named networks where they are not in memory."""
        ...

    def hold(self, network: str, module: nn.Module) -> nn.Module:
        """Change a network that was read, or its skeleton, to lie in memory as ``model`` says."""
        ...

    def release(self, *networks: str) -> None:
        """Free the named networks. They can be required again."""
        ...

    def fresh(self, network: str) -> nn.Module:
        """Another copy of a network as it is on disk: on the CPU, frozen, in ``eval()``, not in ``networks``."""
        ...

    def twin(self, originals: Mapping[str, Tensor]) -> ModelFamily:
        """The same model by itself, as if it had just been loaded: without what methods have added to its networks and
        tokenizers. It shares the weights that are in memory; nobody may write into those.

        Args:
            originals: canonical name -> what the base has in place of a weight in memory.
        """
        ...

    def fingerprint(self, *networks: str) -> str:
        """Hex digest of the named networks' weights and settings as on disk, and of what ``model`` changes of them."""
        ...

    def encode_image(self, pixels: Tensor) -> Posterior:
        """Map [B, 3, H, W] in [-1, 1] to a posterior over unscaled latents. No gradient."""
        ...

    def scale(self, latents: Tensor) -> Tensor:
        """Unscaled latents [B, C, h, w] as the denoiser expects them."""
        ...

    def encode_prompt(self, captions: Sequence[str]) -> Conditioning:
        """Tokenize and encode; gradients flow where a text encoder trains. Over-long captions are cut.

        With several ``prompt_chunks`` captions take as many as they need, and may so differ in length.
        """
        ...

    def caption_overflow(self, caption: str, words: Mapping[str, int] | None = None) -> int:
        """How many tokens of ``caption`` ``encode_prompt`` would cut off; needs the tokenizer alone.

        Args:
            words: new words and how many tokens each will be, where the tokenizer does not know them yet.
        """
        ...

    def prompt_length(self, caption: str, words: Mapping[str, int] | None = None) -> int:
        """How many tokens ``encode_prompt`` makes of ``caption``; arguments as of ``caption_overflow``."""
        ...

    def predict(self, noisy: Tensor, timesteps: Tensor, prompt: Conditioning, geometry: Tensor) -> Tensor:
        """Answer the objective's question for [B, C, h, w]; same shape out. ``geometry`` as in ``Batch``."""
        ...

    def enable_gradient_checkpointing(self) -> None:
        """Trade time for memory in the networks in memory that can train; it acts in ``train()`` mode only."""
        ...

    def scheduler(self) -> Any:
        """A fresh copy of the model's scheduler of diffusers, with the settings of ``sampling``."""
        ...

    def guided(self, scale: float, prompts: int = 1) -> dict[str, Any]:
        """What its pipeline is told for classifier-free guidance of this ``scale`` with so many prompts; 1 is none."""
        ...

    def pipeline(self) -> DiffusionPipeline:
        """A pipeline around the networks in memory (all are required first), for sampling; shares their weights."""
        ...
