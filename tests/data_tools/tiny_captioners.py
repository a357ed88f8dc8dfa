"""Random twins of the models that caption, each with its true file layout, tokenizer and processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

SIDE = 32
WORDS = (
    *(
        "a",
        "an",
        "the",
        "photo",
        "of",
        "dog",
        "cat",
        "star",
        "on",
        "in",
        "beach",
        "red",
        "blue",
        "green",
        "two",
        "with",
    ),
    *("what", "does", "image", "describe", "detail", "user", "assistant", "this", "picture", "sky", "sand", "runs"),
)
CHAT = (
    "{% for message in messages %}{{ message.role }} {% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 16,
}
TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}
SQUARE = {"height": SIDE, "width": SIDE}


def photographs(count: int = 3) -> list[Image.Image]:
    """Pictures of different sizes that have nothing in common."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (24 + 16 * (index % 3), 40, 3), dtype=np.uint8)) for index in range(count)
    ]


def write_blip(path: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", *WORDS]
    tokenizer = hf.BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    text = {
        **TEXT,
        "vocab_size": len(words),
        "encoder_hidden_size": 16,
        "intermediate_size": 32,
        "bos_token_id": 4,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "sep_token_id": 3,
    }
    config = hf.BlipConfig(text_config=text, vision_config=VISION, projection_dim=16, image_text_hidden_size=16)
    return _save(path, hf.BlipForConditionalGeneration, config, hf.BlipProcessor(_blip_images(), tokenizer))


def write_blip2(path: Path, speaker: str = "opt") -> Path:
    """``speaker`` is "opt", which goes on with its prompt, or "t5", which answers."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    tokenizer = _tokenizer(
        special, bos_token="<s>", eos_token="</s>", pad_token="<pad>", additional_special_tokens=["<image>"]
    )
    size = len(tokenizer)
    opt = hf.OPTConfig(
        **TEXT, vocab_size=size, ffn_dim=32, word_embed_proj_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    t5 = hf.T5Config(
        vocab_size=size,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
        bos_token_id=1,
    )
    qformer = {**TEXT, "intermediate_size": 32, "encoder_hidden_size": 16, "vocab_size": 10}
    config = hf.Blip2Config(
        vision_config=VISION,
        qformer_config=qformer,
        text_config=(opt if speaker == "opt" else t5).to_dict(),
        num_query_tokens=4,
        image_token_index=4,
    )
    processor = hf.Blip2Processor(_blip_images(), tokenizer, num_query_tokens=4)
    return _save(path, hf.Blip2ForConditionalGeneration, config, processor)


def write_florence2(path: Path) -> Path:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<image>"]
    tokenizer = _tokenizer(
        special, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
    )
    text = hf.BartConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    )
    vision = hf.Florence2VisionConfig(
        depths=(1, 1),
        patch_size=(7, 3),
        patch_stride=(4, 2),
        patch_padding=(3, 1),
        patch_prenorm=(False, True),
        embed_dim=(8, 16),
        num_heads=(2, 2),
        num_groups=(2, 2),
        window_size=4,
        projection_dim=16,
    )
    config = hf.Florence2Config(text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_id=4)
    images = hf.CLIPImageProcessorPil(size=SQUARE, do_center_crop=False)
    images.image_seq_length = 17  # 4 x 4 places and their mean
    return _save(path, hf.Florence2ForConditionalGeneration, config, hf.Florence2Processor(images, tokenizer), seed=6)


def write_llava(path: Path) -> Path:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<image>"]
    tokenizer = _tokenizer(
        special, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
    )
    text = hf.LlamaConfig(
        **TEXT, vocab_size=len(tokenizer), intermediate_size=32, bos_token_id=0, pad_token_id=1, eos_token_id=2
    )
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION), text_config=text, image_token_index=4, vision_feature_layer=-1
    )
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )
    return _save(path, hf.LlavaForConditionalGeneration, config, processor)


def write_qwen2_vl(path: Path) -> tuple[Path, Callable[[], Any]]:
    """A model, and what makes its processor without the part that reads films, which needs torchvision."""
    special = ["<|im_end|>", "<|pad|>", "<unk>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _tokenizer(special, eos_token="<|im_end|>", pad_token="<|pad|>", additional_special_tokens=special[3:])
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {
        **TEXT,
        "vocab_size": len(tokenizer),
        "intermediate_size": 32,
        "num_key_value_heads": 2,
        "rope_parameters": rope,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    vision = {
        "depth": 1,
        "embed_dim": 16,
        "hidden_size": 16,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = hf.Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    images = hf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64 * 4, max_pixels=64 * 24)
    template = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    _save(path, hf.Qwen2VLForConditionalGeneration, config, tokenizer)
    images.save_pretrained(path)

    class WithoutFilms(hf.Qwen2VLProcessor):
        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id, self.video_token_id = 5, 6
            hf.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return path, lambda: WithoutFilms(images, tokenizer, chat_template=template)


def write_clip(path: Path, kind: str = "clip") -> Path:
    """``kind`` is "clip" or "siglip"."""
    special = ["<s>", "</s>", "<unk>"]
    tokenizer = _tokenizer(special, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=16, ends=True)
    text = {
        **TEXT,
        "vocab_size": len(tokenizer),
        "intermediate_size": 32,
        "max_position_embeddings": 16,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if kind == "clip":
        images = hf.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE)
        config = hf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
        return _save(path, hf.CLIPModel, config, hf.CLIPProcessor(images, tokenizer))
    config = hf.SiglipConfig(text_config={**text, "projection_size": 16}, vision_config=VISION)
    processor = hf.SiglipProcessor(hf.SiglipImageProcessorPil(size=SQUARE), tokenizer)
    return _save(path, hf.SiglipModel, config, processor)


def _blip_images() -> Any:
    return hf.BlipImageProcessorPil(size=SQUARE)


def _tokenizer(special: list[str], ends: bool = False, **tokens: Any) -> Any:
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    found = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        found.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return hf.PreTrainedTokenizerFast(tokenizer_object=found, unk_token="<unk>", **tokens)


def _save(path: Path, kind: Any, config: Any, processor: Any, seed: int = 0) -> Path:
    """Weights are large, so that pictures that differ are captioned differently."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = kind(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.5)
    model.eval().save_pretrained(path)
    processor.save_pretrained(path)
    return path
