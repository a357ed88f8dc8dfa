"""Sana: a Gemma 2 text encoder, a transformer of linear attention that reads the prompt by cross-attention, an
autoencoder that makes one cell of 32 x 32 pixels (Xie et al. 2024, https://arxiv.org/abs/2410.10629).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from finetune.batch import Conditioning, Posterior
from finetune.errors import UserError
from finetune.families.language_model import TEXT_ENCODER, LanguageModelFolder, ask
from finetune.families.parts import Part
from finetune.families.patterns import NORMS
from finetune.families.unet import READERS
from finetune.family import ExportNames, Published, Sites, Unsupported, Vocabulary

WORDS = 300
"""Tokens that the denoiser is given: the first, the instruction's last and those of a caption."""

_BLOCK = r"transformer_blocks\.\d+"
_ATTENTION = [rf"{_BLOCK}\.attn[12]\.to_(q|k|v|out\.0)"]


@functools.cache
def instruction() -> Sequence[str]:
    """Lines that the pipeline puts before a prompt; part of the model. The pipeline takes its time to be imported."""
    from diffusers import SanaPipeline

    lines: Sequence[str] = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return lines


class LowerCase(Vocabulary):
    """Of a pipeline that makes lower case of its prompts."""

    def add(self, word: str, vectors: int) -> list[int]:
        """As ``Vocabulary.add``.

        Raises:
            UserError: the word would never be read.
        """
        if word != word.lower():
            raise UserError(f"{word!r} would never be read: prompts are put into lower case; write {word.lower()!r}")
        return super().add(word, vectors)


class Sana(LanguageModelFolder):
    """A folder in the layout of ``SanaPipeline``.

    Raises:
        UserError: a part is missing, or the scheduler is none that this family trains with.
    """

    name: ClassVar[str] = "sana"
    published = Published("sana")
    models: ClassVar[str] = "Sana"
    pipelines: ClassVar[Sequence[str]] = ("SanaPipeline",)
    parts: ClassVar[Mapping[str, Part]] = {
        "denoiser": Part("transformer", "diffusers.SanaTransformer2DModel"),
        "vae": Part("vae", "diffusers.AutoencoderDC"),
        TEXT_ENCODER: Part("text_encoder", "transformers.Gemma2Model", tokenizer="tokenizer"),
    }
    readers: ClassVar[tuple[str, str] | Unsupported] = READERS
    patch: ClassVar[int] = 1

    def __init__(self, folder: Path, source: str | None = None) -> None:
        super().__init__(folder, source)
        self.vocabularies = {TEXT_ENCODER: LowerCase(self.tokenizers[TEXT_ENCODER], TEXT_ENCODER)}
        self._before = "\n".join(instruction())
        self.length = len(self.tokenizers[TEXT_ENCODER](self._before).input_ids) + WORDS - 2
        self.pixel_multiple = self.latent_scale * self.patch
        self.sites = Sites(
            linears={
                "attention": {"denoiser": _ATTENTION},
                "cross-attention": {"denoiser": [rf"{_BLOCK}\.attn2\.to_(q|k|v|out\.0)"]},
                "cross-kv": {"denoiser": [rf"{_BLOCK}\.attn2\.to_[kv]"]},
                "wide": {"denoiser": [*_ATTENTION, rf"{_BLOCK}\.ff\.conv_(inverted|point)"]},
            },
            selections={
                "all": {"denoiser": [""]},
                "attention": {"denoiser": [r"\.attn[12]\."]},
                "cross-attention": {"denoiser": [r"\.attn2\."]},
                "cross-kv": {"denoiser": [r"\.attn2\.to_[kv]\."]},
                "norm-bias": {"denoiser": NORMS},
                "blocks": {"denoiser": [r"^transformer_blocks\."]},
            },
            readers=self.readers,
            vocabularies=list(self.vocabularies.values()),
        )
        self.export_names = {"denoiser": ExportNames("transformer")}

    def latent_size(self, settings: Mapping[str, Any]) -> tuple[int, int]:
        """As the autoencoder with two halves of unlike depths calls them."""
        return settings["latent_channels"], 2 ** (len(settings["encoder_block_out_channels"]) - 1)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Posterior:
        """Map [B, 3, H, W] in [-1, 1] to unscaled latents [B, C, H / scale, W / scale], float32, without variance."""
        vae: Any = self.networks["vae"]
        latents: Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent.float()
        return Posterior(mean=latents, logvar=torch.full_like(latents, -torch.inf))

    def wrap(self, text: str) -> str:
        """``text`` behind the instruction; where there is none, nothing, as the pipeline guides away from it."""
        tokenizer = self.tokenizers[TEXT_ENCODER]
        start: str = tokenizer.decode(tokenizer("").input_ids)  # with which it begins every text
        return f"{start}{self._before}{text.lower().strip()}" if text else start

    def encode_prompt(self, captions: Sequence[str]) -> Conditioning:
        """The last states, after the final norm, of the first token and of those behind the instruction, 300 in all;
        the denoiser is told which are real.
        """
        told = self.told(captions, padding="max_length", padding_side="right")
        states = ask(self.networks[TEXT_ENCODER], told)[-1]
        kept = [0, *range(1 - WORDS, 0)]
        mask = torch.tensor(told["attention_mask"], dtype=torch.bool, device=states.device)
        return Conditioning(tokens=states[:, kept], mask=mask[:, kept])

    def prompt_length(self, caption: str, words: Mapping[str, int] | None = None) -> int:
        """The same for all: padding is masked."""
        return WORDS

    def predict(self, noisy: Tensor, timesteps: Tensor, prompt: Conditioning, geometry: Tensor) -> Tensor:
        """The transformer's answer, [B, C, h, w]. It does not look at ``geometry``."""
        answer: Tensor = self.networks["denoiser"](
            noisy,
            encoder_hidden_states=prompt.tokens,
            encoder_attention_mask=None if prompt.mask is None else prompt.mask.long(),
            timestep=timesteps * self.settings["denoiser"].get("timestep_scale", 1.0),
            return_dict=False,
        )[0]
        return answer

    def guided(self, scale: float, prompts: int = 1) -> dict[str, Any]:
        """Pictures are of the size that is asked for, and not of the nearest that the model was made with."""
        return {"guidance_scale": scale, "use_resolution_binning": False}

    def pipeline(self) -> Any:
        """An ordinary pipeline around the networks in memory, that reads prompts behind the instruction."""
        pipeline = super().pipeline()
        plain = pipeline.encode_prompt

        @functools.wraps(plain)
        def encode_prompt(*arguments: Any, **named: Any) -> Any:
            asked = inspect.signature(plain).bind(*arguments, **named)
            asked.arguments.setdefault("complex_human_instruction", instruction())
            return plain(*asked.args, **asked.kwargs)

        pipeline.encode_prompt = encode_prompt
        return pipeline


def tiny(path: Path, *, seed: int = 0) -> Path:
    """Write a ``SanaPipeline`` folder with random weights; see ``finetune.families.tiny``."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    from finetune.families.tiny import drawn
    from finetune.families.tiny_gemma import gemma2, tokenizer

    width, channels = 16, 4
    words = tokenizer(" ".join(instruction()).split())
    both = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in _HALF.items()}
    with drawn(seed):
        SanaPipeline(
            tokenizer=words,
            text_encoder=gemma2(width, len(words)),
            vae=AutoencoderDC(latent_channels=channels, attention_head_dim=4, scaling_factor=0.41407, **both).eval(),
            transformer=SanaTransformer2DModel(
                in_channels=channels,
                out_channels=channels,
                num_attention_heads=2,
                attention_head_dim=8,
                num_layers=2,
                num_cross_attention_heads=2,
                cross_attention_head_dim=8,
                cross_attention_dim=16,
                caption_channels=width,
                sample_size=32,  # the pipeline knows four alone
            ).eval(),
            scheduler=DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        ).save_pretrained(path)
    return path


_HALF = {
    "block_types": "ResBlock",
    "block_out_channels": (8, 8),
    "layers_per_block": (1, 1),
    "qkv_multiscales": ((), ()),
}
"""Of a tiny autoencoder."""

FAMILY = Sana
