"""The small CLIP: a text tower, which becomes the base's text encoder, and an image tower, by symmetric InfoNCE.

Source: Radford et al. 2021, "Learning transferable visual models from natural language supervision".
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from finetune.tinyworld import captions, world
from finetune.tinyworld.tokenizer import LENGTH, build
from finetune.tinyworld.training import data
from finetune.tinyworld.training.fit import Plan, fit
from finetune.tinyworld.vision import Eye, spoil
from finetune.tinyworld.world import FACTORS

WIDTH, JOINT = 128, 64


def build_text_encoder() -> CLIPTextModel:
    """The untrained text encoder: 4 layers, 128 wide, as SD 1's in kind."""
    tokenizer = build()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=JOINT,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


class Clip(nn.Module):
    """Both towers, their projections to ``JOINT`` dimensions, and the temperature (as its logarithm)."""

    def __init__(self, text: CLIPTextModel | None = None) -> None:
        super().__init__()
        self.text = text if text is not None else build_text_encoder()
        self.eye = Eye()
        self.text_projection = nn.Linear(WIDTH, JOINT, bias=False)
        self.image_projection = nn.Linear(self.eye.features, JOINT, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def embed_text(self, ids: Tensor) -> Tensor:
        """Token ids (B, 24) to unit vectors (B, 64)."""
        return nn.functional.normalize(self.text_projection(self.text(ids).pooler_output), dim=-1)

    def embed_images(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, 64, 64) in [0, 1] to unit vectors (B, 64)."""
        return nn.functional.normalize(self.image_projection(self.eye(pictures)), dim=-1)


def contrastive_loss(model: Clip, pictures: Tensor, ids: Tensor) -> Tensor:
    """Symmetric InfoNCE; two equal captions in a batch are not asked to differ.

    Args:
        pictures: float (B, 3, 64, 64) in [0, 1].
        ids: token ids (B, 24), or (2B, 24) where the second half holds a wrong caption of each picture.
    """
    count = len(pictures)
    scale, seen, read = model.scale.exp().clamp(max=50), model.embed_images(pictures), model.embed_text(ids)
    similar = scale * seen @ read[:count].T
    same = (ids[:count, None] == ids[None, :count]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    columns = -(target * similar.T.log_softmax(1)).sum(1).mean()
    if len(ids) > count:
        own = scale * (seen * read[count:]).sum(-1, keepdim=True)
        own = own.masked_fill((ids[count:] == ids[:count]).all(-1, keepdim=True), float("-inf"))
        similar = similar - torch.cat([similar, own], 1).logsumexp(1, keepdim=True)
    else:
        similar = similar.log_softmax(1)
    return 0.5 * (columns - (target * similar).sum(1).mean())


def misnamed(text: str, named: dict[str, str], generator: np.random.Generator) -> str:
    """The caption with one of the named values exchanged: the fill where it is named; unchanged if it names nothing."""
    if not named:
        return text
    name = "fill" if "fill" in named else sorted(named)[int(generator.integers(len(named)))]
    others = [value for value in FACTORS[name] if value != named[name]]
    other = others[int(generator.integers(len(others)))]
    return f" {text} ".replace(f" {named[name]} ", f" {other} ", 1).strip()


def train(folder: Path, steps: int, batch: int, seed: int, start: str = "", wrong: bool = False) -> None:
    """Train to ``folder/model``, from random weights or from those of the stage ``start``.

    Towers that have had a start are sharpened: in every other batch all scenes have one shape and one colour, so that
    only what is hard to see, the fill above all, can tell them apart. With ``wrong`` every picture also has to tell its
    caption from one that is wrong in a single word (Yuksekgonul et al. 2023), in the fill where it names one.
    """
    scenes, tokenizer = data.training_scenes(folder.parent / "data"), build()
    kinds = scenes.factors[:, 0] * len(FACTORS["colour"]) + scenes.factors[:, 1]
    torch.manual_seed(seed)
    model = load(folder.parent / start).train().requires_grad_(True) if start else Clip()

    def loss_of(network: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(scenes), (batch,), generator=generator).tolist()
        if start and step % 2:
            alike = np.flatnonzero(kinds == kinds[rows[0]])
            rows = alike[torch.randperm(len(alike), generator=generator)[:batch].numpy()].tolist()
        key = int(torch.randint(2**31, (), generator=generator))
        factors = [data.named_factors(scenes.factors[row]) for row in rows]
        said = [captions.caption(named, world.rng("clip", key, row)) for named, row in zip(factors, rows, strict=True)]
        words = [text for text, _ in said]
        if wrong:
            words += [misnamed(*each, world.rng("wrong", key, row)) for each, row in zip(said, rows, strict=True)]
        ids = tokenizer(words, padding="max_length", return_tensors="pt").input_ids
        pictures = torch.stack([torch.from_numpy(scenes.pictures[row].copy()) for row in rows])
        seen = spoil(pictures.permute(0, 3, 1, 2).float() / 255, generator)
        with torch.autocast("cpu", torch.bfloat16):
            return contrastive_loss(network, seen, ids).float()  # type: ignore[arg-type]

    plan = Plan(steps, 1e-3, warmup=steps // 10, hold=0.1, average=0.99, decay=0.05, seed=seed)
    trained = fit(model, loss_of, plan, folder)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        save(trained, folder)


def save(model: nn.Module, folder: Path) -> None:
    """``model/``: text encoder and tokenizer as the pipeline wants them; ``towers.safetensors``: the rest."""
    assert isinstance(model, Clip)
    model.text.save_pretrained(folder / "model" / "text_encoder")
    build().save_pretrained(folder / "model" / "tokenizer")
    rest = {key: value.contiguous() for key, value in model.state_dict().items() if not key.startswith("text.")}
    save_file(rest, folder / "model" / "towers.safetensors")
    (folder / "model" / "towers.json").write_text(json.dumps({"width": WIDTH, "joint": JOINT}) + "\n")


def load(folder: Path) -> Clip:
    """The model that ``save`` wrote."""
    model = Clip(CLIPTextModel.from_pretrained(folder / "model" / "text_encoder"))
    model.load_state_dict(load_file(folder / "model" / "towers.safetensors"), strict=False)
    return model.eval().requires_grad_(False)
