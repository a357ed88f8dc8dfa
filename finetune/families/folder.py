"""What families have in common: a folder in diffusers' layout, whose networks are loaded and freed one by one."""

from __future__ import annotations

import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune.batch import Conditioning, Posterior
from finetune.blocks import blocks_of
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import holding
from finetune.families.outlines import filled, outline
from finetune.families.parts import Part, file_digest, load_tokenizer, read_json
from finetune.families.schedulers import with_settings
from finetune.families.words import write_out
from finetune.family import ExportNames, Published, Sites, Unsupported, Vocabulary
from finetune.objective import Objective
from finetune.objectives import Denoising, Process, process_of


class DiffusersFolder(ABC):
    """A folder that ``diffusers`` pipelines load from, as ``finetune.family.ModelFamily`` asks for it.

    A family says what its ``parts`` are and how they are fed; where they come from, and when, is the same for all.

    Args:
        folder: holds ``model_index.json`` and a folder for every part.
        source: what a recipe's ``model.path`` calls the model.

    Raises:
        UserError: a part is missing, or the scheduler is none that can be trained with.
    """

    name: ClassVar[str]
    pipelines: ClassVar[Sequence[str]]
    """Names in ``model_index.json`` that the family is known by; the first is the pipeline that it samples with."""
    parts: ClassVar[Mapping[str, Part]]
    """By their names in ``networks``: "denoiser", "vae", and the text encoders in the pipeline's order."""
    models: ClassVar[str]
    """What people call the models of the family."""
    readers: ClassVar[tuple[str, str] | Unsupported]
    """As in ``finetune.family.Sites``."""
    space: ClassVar[Unsupported | None] = Unsupported("no CLIP is known that its prompts and pictures have in common")
    """Why there is no ``shared_space``; None where there is one."""
    chunks: ClassVar[Unsupported | None] = Unsupported("its prompts are not read by CLIPs alone")
    """Why no prompt takes several ``prompt_chunks``; None where it does."""

    time_unit: ClassVar[float] = 1000.0
    """Of flow matching: the denoiser is told so many times ``sigma``."""
    patch: ClassVar[int] = 2
    """Latent cells along a side of an image token, where the denoiser has tokens."""

    guidance: float | None = None
    """What a guidance-distilled denoiser is told in training."""

    process: Process
    objective: Objective
    sites: Sites
    export_names: Mapping[str, ExportNames]
    published: Published = Published()
    pixel_multiple: int

    def __init__(self, folder: Path, source: str | None = None) -> None:
        self.folder = folder
        self.source = source or str(folder)
        self.networks = nn.ModuleDict()
        self._outlines: dict[str, nn.Module] = {}  # of networks in memory, as they were before anything was added
        self._aside: dict[str, nn.Module] = {}  # networks that twins need and training does not
        self.device = torch.device("cpu")
        self.model = ModelConfig()
        self.prompt_chunks = 1
        self.sampling: Mapping[str, Any] = {}
        self.components = {network: part.subfolder for network, part in self.parts.items()}
        self.text_encoders: Sequence[str] = tuple(name for name, part in self.parts.items() if part.tokenizer)
        for network, part in self.parts.items():
            if not (folder / part.subfolder / "config.json").is_file():
                raise UserError(f"{folder}: the {network} is missing: no {part.subfolder}/config.json")
        self.settings = {name: read_json(folder / part.subfolder / "config.json") for name, part in self.parts.items()}
        self.latent_channels, self.latent_scale = self.latent_size(self.settings["vae"])
        self.process = process_of(self.scheduler(), folder / "scheduler", unit=self.time_unit, patch=self.patch)
        self.objective = Denoising(self.process)
        self.tokenizers = {
            name: load_tokenizer(folder, self.parts[name].tokenizer or "") for name in self.text_encoders
        }
        self.vocabularies = {name: Vocabulary(one, name) for name, one in self.tokenizers.items()}

    def latent_size(self, settings: Mapping[str, Any]) -> tuple[int, int]:
        """Numbers per latent cell and pixels along its side, as the autoencoder's ``settings`` say them."""
        return settings.get("latent_channels", 4), 2 ** (len(settings["block_out_channels"]) - 1)

    def scheduler(self) -> Any:
        """A fresh copy of the folder's scheduler, with the settings of ``sampling``."""
        kind = read_json(self.folder / "scheduler" / "scheduler_config.json")["_class_name"]
        found = getattr(importlib.import_module("diffusers"), kind)
        own = found.from_pretrained(self.folder, subfolder="scheduler", local_files_only=True)
        return with_settings(own, self.sampling)

    def require(self, *networks: str) -> None:
        """Load the named networks onto ``device`` where they are not in memory, as ``hold`` has them.

        Raises:
            UserError: as ``fresh``; or the autoencoder overflows in the dtype that it was to have.
        """
        for network in networks:
            if network not in self.networks:
                packed = self._packed(network, self._read(network, self._dtype(network)))
                self._outlines[network] = outline(packed)
                self.networks[network] = self._arranged(network, packed)

    def fresh(self, network: str) -> nn.Module:
        """Another copy of a network as it is on disk: float32, on the CPU, frozen, in ``eval()``.

        Raises:
            UserError: the files hold no safetensors (a pickle is never opened) or do not fit the settings.
        """
        return self._read(network, torch.float32)

    def hold(self, network: str, module: nn.Module) -> nn.Module:
        """Let a network that was read lie in memory as ``model`` says: packed, and some of it on the CPU.

        Args:
            module: changed in place; of the dtype that ``model`` says. A skeleton stays on the meta device.
        """
        return self._arranged(network, self._packed(network, module))

    def _packed(self, network: str, module: nn.Module) -> nn.Module:
        return holding.pack(self.model, network, module, blocks_of(module))

    def _arranged(self, network: str, module: nn.Module) -> nn.Module:
        return holding.arrange(self.model, network, module, blocks_of(module), self.device)

    def _dtype(self, network: str) -> torch.dtype:
        name = self.model.dtype_of(network)
        if network == "vae" and name == "float16" and self.settings["vae"].get("force_upcast", False):
            said = self.folder / self.parts[network].subfolder / "config.json"
            raise UserError(
                f"model.vae_dtype is float16, in which this autoencoder overflows: {said} says force_upcast; "
                "bfloat16 or float32 would do"
            )
        found: torch.dtype = getattr(torch, name)
        return found

    def _read(self, network: str, dtype: torch.dtype) -> nn.Module:
        part = self.parts[network]
        try:
            loaded = part.type.from_pretrained(
                self.folder,
                subfolder=part.subfolder,
                torch_dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                **part.settings,
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{self.folder / part.subfolder}: cannot be loaded: {str(error).splitlines()[0]}"
            ) from error
        bare: nn.Module = loaded.eval().requires_grad_(False)
        return bare

    def twin(self, originals: Mapping[str, Tensor]) -> DiffusersFolder:
        """The same model without what methods have added; see ``finetune.family.ModelFamily``.

        Networks that are not in memory are read when the first twin is made and are kept on the CPU for the next.
        """
        other = type(self)(self.folder, self.source)
        other.device, other.model, other.prompt_chunks = self.device, self.model, self.prompt_chunks
        other.objective, other.sampling, other.guidance = self.objective, self.sampling, self.guidance
        for network in self.parts:
            if network in self.networks and network in self._outlines:
                frame, held = self._outlines[network], self.networks[network]
            else:
                if network not in self._aside:
                    self._aside[network] = self._packed(network, self._read(network, self._dtype(network)))
                frame, held = outline(self._aside[network]), self._aside[network]
            own = {name.removeprefix(f"{network}."): one for name, one in originals.items()}
            other.networks[network] = other._arranged(network, filled(frame, held, own))
        return other

    def release(self, *networks: str) -> None:
        """Free the named networks."""
        for network in networks:
            if network in self.networks:
                del self.networks[network]
                self._outlines.pop(network, None)

    def fingerprint(self, *networks: str) -> str:
        """SHA-256 over the files of the named networks and how they are held, hex; a text encoder's includes its
        tokenizer's.
        """
        digest = hashlib.sha256()
        for network in sorted(networks):
            digest.update(f"{network}\n{holding.changes(self.model, network)}".encode())
            part = self.parts[network]
            folders = [part.subfolder, *([part.tokenizer] if part.tokenizer else [])]
            for file in sorted(file for name in folders for file in (self.folder / name).iterdir()):
                if file.suffix in {".json", ".txt", ".jinja", ".safetensors", ".model"}:
                    digest.update(f"{file.name} {file_digest(file)}\n".encode())
        return digest.hexdigest()

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Posterior:
        """Map [B, 3, H, W] in [-1, 1] to a posterior over unscaled latents [B, C, H / scale, W / scale], float32."""
        vae: Any = self.networks["vae"]
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return Posterior(mean=posterior.mean.float(), logvar=posterior.logvar.float())

    def scale(self, latents: Tensor) -> Tensor:
        """``(latents - shift) * scaling_factor``, or the per-channel form where the autoencoder's settings have one."""
        settings = self.settings["vae"]
        mean, std = settings.get("latents_mean"), settings.get("latents_std")
        factor = settings.get("scaling_factor", 0.18215 if mean is None else 1.0)
        if mean is not None and std is not None:
            mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
            return (latents - mean) * factor / std
        return (latents - (settings.get("shift_factor") or 0.0)) * factor

    @abstractmethod
    def encode_prompt(self, captions: Sequence[str]) -> Conditioning:
        """What the pipeline's own ``encode_prompt`` gives."""

    @abstractmethod
    def caption_overflow(self, caption: str, words: Mapping[str, int] | None = None) -> int:
        """How many tokens of ``caption`` are cut off, where ``words`` are as many tokens as they say."""

    @abstractmethod
    def prompt_length(self, caption: str, words: Mapping[str, int] | None = None) -> int:
        """How many tokens ``encode_prompt`` makes of ``caption``."""

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, prompt: Conditioning, geometry: Tensor) -> Tensor:
        """What the pipeline asks its denoiser."""

    def enable_gradient_checkpointing(self) -> None:
        """Trade time for memory in the networks that train and are in memory. It acts in ``train()`` mode only."""
        if "denoiser" in self.networks:
            self.networks["denoiser"].enable_gradient_checkpointing()  # type: ignore[operator]
        for network in self.text_encoders:
            if network in self.networks:
                module: Any = self.networks[network]
                # transformers' older name for it warns where there is the newer one
                newer = hasattr(module, "activation_checkpointing_enable")
                enable = module.activation_checkpointing_enable if newer else module.gradient_checkpointing_enable
                enable({"use_reentrant": False})  # gradients then reach the weights although no input asks for one

    def guided(self, scale: float, prompts: int = 1) -> dict[str, Any]:
        """As most pipelines call it."""
        return {"guidance_scale": scale}

    def pipeline(self) -> Any:
        """An ordinary pipeline around the networks in memory, with a fresh scheduler from the folder."""
        self.require(*self.parts)
        kind = getattr(importlib.import_module("diffusers"), self.pipelines[0])
        parts = {part.subfolder: self.networks[network] for network, part in self.parts.items()}
        tokenizers = {self.parts[name].tokenizer or "": one for name, one in self.tokenizers.items()}
        pipeline = kind(**parts, **tokenizers, scheduler=self.scheduler(), **self.pipeline_settings())
        if any(vocabulary.words for vocabulary in self.vocabularies.values()):
            # diffusers' own inserts all tokens of a word, also those of a growing word that are still to come
            if hasattr(pipeline, "maybe_convert_prompt"):
                pipeline.maybe_convert_prompt = self._expand
            else:
                write_out(pipeline, self.vocabularies[self.text_encoders[0]].expand)
        return pipeline.to(next(self.networks["denoiser"].parameters()).device)

    def pipeline_settings(self) -> dict[str, Any]:
        """What else the pipeline's class wants to be told."""
        return {}

    def _expand(self, prompt: str | list[str], tokenizer: Any) -> str | list[str]:
        vocabulary = next(one for one in self.vocabularies.values() if one.tokenizer is tokenizer)
        return list(map(vocabulary.expand, prompt)) if isinstance(prompt, list) else vocabulary.expand(prompt)
