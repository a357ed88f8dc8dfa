"""Z-Image and Z-Image-Turbo: a Qwen3 text encoder, a transformer of one stream (Z-Image team 2025,
https://arxiv.org/abs/2511.22699).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from finetune.batch import Conditioning
from finetune.families import one_stream
from finetune.families.language_model import TEXT_ENCODER, LanguageModelFolder, apart, ask
from finetune.families.parts import Part
from finetune.family import ExportNames, Published, Sites


class ZImage(LanguageModelFolder):
    """A folder in the layout of ``ZImagePipeline``.

    Raises:
        UserError: a part is missing, or the scheduler is none that this family trains with.
    """

    name: ClassVar[str] = "z-image"
    published = Published("z-image")
    models: ClassVar[str] = "Z-Image and Z-Image-Turbo"
    pipelines: ClassVar[Sequence[str]] = ("ZImagePipeline",)
    parts: ClassVar[Mapping[str, Part]] = {
        "denoiser": Part("transformer", "diffusers.ZImageTransformer2DModel"),
        "vae": Part("vae", "diffusers.AutoencoderKL"),
        TEXT_ENCODER: Part("text_encoder", "transformers.Qwen3Model", tokenizer="tokenizer"),
    }
    length: int = 512

    def __init__(self, folder: Path, source: str | None = None) -> None:
        super().__init__(folder, source)
        self.pixel_multiple = self.latent_scale * self.patch
        self.sites = Sites(
            linears=one_stream.linears(
                "attention", r"feed_forward\.w[123]", rf"{one_stream.BLOCK}\.adaLN_modulation\.0"
            ),
            selections=one_stream.selections("attention"),
            readers=self.readers,
            vocabularies=list(self.vocabularies.values()),
            # what fills up pictures and prompts, of which some sizes have nothing to fill; what looks at other pictures
            unread={"denoiser": [r"^(x|cap)_pad_token$", r"^siglip_"]},
        )
        self.export_names = {"denoiser": ExportNames("transformer")}

    def wrap(self, text: str) -> str:
        """``text`` as a user's question to a Qwen3 that may think before it answers."""
        wrapped: str = self.tokenizers[TEXT_ENCODER].apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return wrapped

    def encode_prompt(self, captions: Sequence[str]) -> Conditioning:
        """The states before the last layer, of each caption's own tokens, those of the template included."""
        told = self.told(captions, padding="max_length")
        states = ask(self.networks[TEXT_ENCODER], told)[-2]
        places = [[place for place, real in enumerate(row) if real] for row in told["attention_mask"]]
        return Conditioning.stack([Conditioning(tokens=states[row, own][None]) for row, own in enumerate(places)])

    def prompt_length(self, caption: str, words: Mapping[str, int] | None = None) -> int:
        """Those of the template included; nothing is padded."""
        return min(self.count(caption, words), self.length)

    def predict(self, noisy: Tensor, timesteps: Tensor, prompt: Conditioning, geometry: Tensor) -> Tensor:
        """The transformer's answer, [B, C, h, w]. It does not look at ``geometry``.

        The transformer counts time from noise, 0, to picture, 1, and answers with ``x0 - eps``.
        """
        answers = self.networks["denoiser"](
            list(noisy.unsqueeze(2).unbind(0)),
            (1000 - timesteps) / 1000,
            apart(prompt),
            return_dict=False,
        )[0]
        return -torch.stack(answers).squeeze(2)

    def guided(self, scale: float, prompts: int = 1) -> dict[str, Any]:
        """The pipeline counts from 0, which is none: it adds so much of the difference to the prompt's answer."""
        return {"guidance_scale": scale - 1 if scale > 1 else 0.0}


def tiny(path: Path, *, seed: int = 0) -> Path:
    """Write a ``ZImagePipeline`` folder with random weights; see ``finetune.families.tiny``."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    from finetune.families.tiny import drawn, unquantised
    from finetune.families.tiny_qwen import qwen3, tokenizer

    width, head = 32, (4, 6, 6)
    with drawn(seed):
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=width,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=width // sum(head),
            n_kv_heads=width // sum(head),
            cap_feat_dim=16,
            axes_dims=list(head),
            axes_lens=[600, 32, 32],  # the first counts tokens of a prompt
        )
        torch.nn.init.normal_(transformer.x_pad_token)  # zeros until it is trained
        torch.nn.init.normal_(transformer.cap_pad_token)
        ZImagePipeline(
            vae=unquantised(0.3611, 0.1159),
            text_encoder=qwen3(16),
            tokenizer=tokenizer(),
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        ).save_pretrained(path)
    return path


FAMILY = ZImage
