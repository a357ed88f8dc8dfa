"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a cross-attention U-Net (Rombach et al. 2022,
https://arxiv.org/abs/2112.10752).
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from finetune.batch import Conditioning, Posterior
from finetune.errors import UserError
from finetune.families.clip import shared_space
from finetune.families.lengths import Lengths
from finetune.family import ExportNames, Sites, Vocabulary
from finetune.objective import DDPM, Objective

_PARTS: Mapping[str, tuple[str, Any]] = {
    "denoiser": ("unet", UNet2DConditionModel),
    "vae": ("vae", AutoencoderKL),
    "text_encoder": ("text_encoder", CLIPTextModel),
}

_ATTENTION = [r".*\.attn[12]\.to_(q|k|v|out\.0)"]
_WIDE = [*_ATTENTION, r".*\.attentions\.\d+\.proj_(in|out)", r".*\.ff\.net\.(0\.proj|2)"]
_CONV = [*_WIDE, r".*\.resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)", r".*\.(down|up)samplers\.0\.conv"]
_TEXT_ATTENTION = [r".*\.self_attn\.(q|k|v|out)_proj"]
_TEXT_WIDE = [*_TEXT_ATTENTION, r".*\.mlp\.fc[12]"]
_TEXT_LAYERS = [r"(^|\.)encoder\.", r"(^|\.)final_layer_norm\."]

LINEARS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "attention": {"denoiser": _ATTENTION, "text_encoder": _TEXT_ATTENTION},
    "cross-attention": {"denoiser": [r".*\.attn2\.to_(q|k|v|out\.0)"], "text_encoder": _TEXT_ATTENTION},
    "cross-kv": {"denoiser": [r".*\.attn2\.to_[kv]"], "text_encoder": _TEXT_ATTENTION},
    "wide": {"denoiser": _WIDE, "text_encoder": _TEXT_WIDE},
    "conv": {"denoiser": _CONV, "text_encoder": _TEXT_WIDE},
}
SELECTIONS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "all": {"denoiser": [""], "text_encoder": [""]},
    "attention": {"denoiser": [r"\.attn[12]\."], "text_encoder": _TEXT_LAYERS},
    "cross-attention": {"denoiser": [r"\.attn2\."], "text_encoder": _TEXT_LAYERS},
    "cross-kv": {"denoiser": [r"\.attn2\.to_[kv]\."], "text_encoder": _TEXT_LAYERS},
    "norm-bias": {"denoiser": [r"norm\w*\.weight$", r"bias$"], "text_encoder": [r"norm\w*\.weight$", r"bias$"]},
    "down": {"denoiser": [r"^down_blocks\."], "text_encoder": _TEXT_LAYERS},
    "mid": {"denoiser": [r"^mid_block\."], "text_encoder": _TEXT_LAYERS},
    "up": {"denoiser": [r"^up_blocks\."], "text_encoder": _TEXT_LAYERS},
}


class SD:
    """A folder in the layout of ``StableDiffusionPipeline``, implementing ``finetune.family.ModelFamily``.

    Args:
        folder: holds ``model_index.json``, ``unet/``, ``vae/``, ``text_encoder/``, ``tokenizer/``, ``scheduler/``.
            How latents are spoiled and what is predicted is read from its scheduler.
        source: what a recipe's ``model.path`` calls the model.
        min_snr_gamma: as in ``finetune.objective.DDPM``.

    Raises:
        UserError: a part is missing, or the scheduler is none that this family trains with.
    """

    name: ClassVar[str] = "sd"
    pipelines: ClassVar[Sequence[str]] = ("StableDiffusionPipeline",)

    def __init__(self, folder: Path, source: str | None = None, min_snr_gamma: float | None = None) -> None:
        self.folder = folder
        self.source = source or str(folder)
        self.networks = nn.ModuleDict()
        self.device = torch.device("cpu")
        self.text_encoders: Sequence[str] = ("text_encoder",)
        for part, (subfolder, _) in _PARTS.items():
            if not (folder / subfolder / "config.json").is_file():
                raise UserError(f"{folder}: the {part} is missing: no {subfolder}/config.json")
        self._unet, self._vae = (_read_json(folder / part / "config.json") for part in ("unet", "vae"))
        if self._unet.get("in_channels", 4) != self._vae.get("latent_channels", 4):
            raise UserError(f"{folder}: the U-Net does not read plain latents; inpainting models cannot be trained")
        self.latent_scale: int = 2 ** (len(self._vae["block_out_channels"]) - 1)
        self.pixel_multiple: int = self.latent_scale * 2 ** (len(self._unet["block_out_channels"]) - 1)
        self.objective: Objective = _objective(folder, self.scheduler(), min_snr_gamma)
        self.tokenizer = _tokenizer(folder)
        self._vocabulary = Vocabulary(self.tokenizer, "text_encoder")
        self._lengths = Lengths(self.tokenizer)
        self.sites = Sites(
            linears=LINEARS,
            selections=SELECTIONS,
            readers=("attn2.to_k", "attn2.to_v"),
            vocabularies=[self._vocabulary],
            shared_space=lambda clip: shared_space(self.fresh("text_encoder"), clip),
        )
        self.export_names: Mapping[str, ExportNames] = {
            "denoiser": ExportNames("unet", "lora_unet"),
            "text_encoder": ExportNames("text_encoder", "lora_te", missing_level=_missing_level()),
        }

    def scheduler(self) -> Any:
        """A fresh copy of the folder's scheduler, of diffusers' class that it names."""
        kind = _read_json(self.folder / "scheduler" / "scheduler_config.json")["_class_name"]
        return getattr(diffusers, kind).from_pretrained(self.folder, subfolder="scheduler", local_files_only=True)

    def require(self, *networks: str) -> None:
        """Load the named networks in float32 onto ``device`` where they are not in memory, frozen, in ``eval()``."""
        for network in networks:
            if network not in self.networks:
                self.networks[network] = self.fresh(network).to(self.device)

    def fresh(self, network: str) -> nn.Module:
        """Another copy of a network as it is on disk: float32, on the CPU, frozen, in ``eval()``.

        Raises:
            UserError: the files hold no safetensors (a pickle is never opened) or do not fit the settings.
        """
        subfolder, kind = _PARTS[network]
        try:
            loaded = kind.from_pretrained(
                self.folder, subfolder=subfolder, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{self.folder / subfolder}: cannot be loaded: {str(error).splitlines()[0]}") from error
        return loaded.eval().requires_grad_(False)

    def release(self, *networks: str) -> None:
        """Free the named networks."""
        for network in networks:
            if network in self.networks:
                del self.networks[network]

    def fingerprint(self, *networks: str) -> str:
        """SHA-256 over the files of the named networks, hex; a text encoder's includes its tokenizer's."""
        digest = hashlib.sha256()
        for network in sorted(networks):
            digest.update(f"{network}\n".encode())
            folders = [_PARTS[network][0], *(["tokenizer"] if network == "text_encoder" else [])]
            for file in sorted(file for name in folders for file in (self.folder / name).iterdir()):
                if file.suffix in {".json", ".txt", ".safetensors"}:
                    status = file.stat()
                    content = _file_digest(file.resolve(), status.st_size, status.st_mtime_ns)
                    digest.update(f"{file.name} {content}\n".encode())
        return digest.hexdigest()

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Posterior:
        """Map [B, 3, H, W] in [-1, 1] to a posterior over unscaled latents [B, C, H / scale, W / scale], float32."""
        vae: Any = self.networks["vae"]
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return Posterior(mean=posterior.mean.float(), logvar=posterior.logvar.float())

    def scale(self, latents: Tensor) -> Tensor:
        """``(latents - shift) * scaling_factor``, or the per-channel form where the autoencoder's settings have one."""
        factor = self._vae.get("scaling_factor", 0.18215)
        mean, std = self._vae.get("latents_mean"), self._vae.get("latents_std")
        if mean is not None and std is not None:
            mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
            return (latents - mean) * factor / std
        return (latents - (self._vae.get("shift_factor") or 0.0)) * factor

    def encode_prompt(self, captions: Sequence[str]) -> Conditioning:
        """The encoder's last hidden states after its final norm, as the pipeline's own ``encode_prompt`` gives them."""
        encoder: Any = self.networks["text_encoder"]
        tokenized = self.tokenizer(
            [self._vocabulary.expand(caption) for caption in captions],
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(encoder.device)
        masked = getattr(encoder.config, "use_attention_mask", False)
        mask = tokenized.attention_mask if masked else None
        return Conditioning(tokens=encoder(tokenized.input_ids, attention_mask=mask)[0])

    def caption_overflow(self, caption: str, words: Mapping[str, int] | None = None) -> int:
        """How many tokens of ``caption`` are cut off, where ``words`` are as many tokens as they say."""
        between = re.split("|".join(map(re.escape, words)), caption) if words else [caption]
        count = sum(map(self._lengths, between))
        count += sum(vectors * caption.count(word) for word, vectors in (words or {}).items())
        return max(0, count + 2 - self.tokenizer.model_max_length)

    def predict(self, noisy: Tensor, timesteps: Tensor, prompt: Conditioning, geometry: Tensor) -> Tensor:
        """The U-Net's answer, [B, C, h, w]. It does not look at ``geometry``."""
        return self.networks["denoiser"](noisy, timesteps, encoder_hidden_states=prompt.tokens, return_dict=False)[0]

    def enable_gradient_checkpointing(self) -> None:
        """Trade time for memory in the networks that train and are in memory. It acts in ``train()`` mode only."""
        if "denoiser" in self.networks:
            self.networks["denoiser"].enable_gradient_checkpointing()  # type: ignore[operator]
        if "text_encoder" in self.networks:
            # non-reentrant: gradients then reach the weights although no input asks for one
            self.networks["text_encoder"].gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    def pipeline(self) -> StableDiffusionPipeline:
        """An ordinary pipeline around the networks in memory, with a fresh scheduler from the folder."""
        self.require(*_PARTS)
        parts = {subfolder: self.networks[network] for network, (subfolder, _) in _PARTS.items()}
        pipeline = StableDiffusionPipeline(
            **parts,
            tokenizer=self.tokenizer,
            scheduler=self.scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).to(next(self.networks["denoiser"].parameters()).device)
        if self._vocabulary.words:
            # diffusers' own inserts all tokens of a word, also those of a growing word that are still to come
            pipeline.maybe_convert_prompt = lambda prompt, _: self._expand(prompt)
        return pipeline

    def _expand(self, prompt: str | list[str]) -> str | list[str]:
        return (
            list(map(self._vocabulary.expand, prompt)) if isinstance(prompt, list) else self._vocabulary.expand(prompt)
        )


def _tokenizer(folder: Path) -> Any:
    # transformers makes an empty tokenizer of a folder that holds none, without a word
    if not any((folder / "tokenizer" / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"{folder}: the tokenizer is missing: no tokenizer/tokenizer.json or tokenizer/vocab.json")
    return CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)


def _objective(folder: Path, scheduler: Any, min_snr_gamma: float | None) -> DDPM:
    """What the model was trained on, as its scheduler says it."""
    table, prediction = getattr(scheduler, "alphas_cumprod", None), scheduler.config.get("prediction_type")
    if table is None or prediction not in ("epsilon", "v_prediction", "sample"):
        raise UserError(f"{folder / 'scheduler'}: {type(scheduler).__name__} with prediction {prediction!r} is unknown")
    # some samplers replace the zero by a tiny number, so the table alone does not tell
    if prediction == "epsilon" and scheduler.config.get("rescale_betas_zero_snr"):
        raise UserError(
            f"{folder / 'scheduler'}: epsilon prediction cannot be trained with zero terminal SNR; "
            "the model needs prediction_type v_prediction"
        )
    return DDPM(table.float(), prediction, min_snr_gamma)


@functools.cache
def _missing_level() -> str:
    """The level that the installed transformers leaves out of CLIPTextModel's names: "text_model." or nothing."""
    with torch.device("meta"):
        config = CLIPTextConfig(hidden_size=4, intermediate_size=4, num_hidden_layers=0, num_attention_heads=1)
        return "" if hasattr(CLIPTextModel(config), "text_model") else "text_model."


@functools.lru_cache(maxsize=1024)
def _file_digest(file: Path, size: int, modified: int) -> str:
    """``size`` and ``modified`` (ns) stand for the content, so that a changed file is read again."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"{file}: missing")
    return json.loads(file.read_text(encoding="utf-8"))
