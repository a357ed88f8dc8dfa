"""Which class a model's files ask for."""

from __future__ import annotations

from data_tools.captioning.captioner import Captioner, Decoding
from data_tools.captioning.loading import TAGS, Source
from data_tools.captioning.tagger import Tagger, Thresholds
from finetune.errors import UserError, nearest

LISTS = ("clip", "siglip")  # kinds that choose phrases of a list


def kind_of(source: Source) -> str:
    """One of "blip", "blip-2", "florence2", "chat", "tagger" and "phrases".

    Raises:
        UserError: it is no model that can describe pictures.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CHAT

    if (source.folder / TAGS).is_file():
        return "tagger"
    kind = source.kind
    if kind is None:
        raise UserError(f"{source.option} {source.name}: has neither a config.json with a model_type nor {TAGS}")
    if kind in ("blip", "blip-2", "florence2"):
        return kind
    if kind in LISTS:
        return "phrases"
    if kind in CHAT:
        return "chat"
    known = ["blip", "blip-2", "florence2", *LISTS, "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava"]
    raise UserError(
        f"{source.option} {source.name}: transformers cannot describe a picture with a {kind!r}{nearest(kind, known)}"
    )


def load_captioner(source: Source, decoding: Decoding, instruction: str | None, thresholds: Thresholds) -> Captioner:
    """The captioner of a source that is no list of phrases.

    Raises:
        UserError: the files cannot be loaded, or the instruction is not for this kind.
    """
    kind = kind_of(source)
    if kind == "tagger":
        if instruction is not None:
            raise UserError("--instruction: a tagger follows none; leave it out")
        return Tagger(source, thresholds)
    if kind == "blip":
        from data_tools.captioning.blip import Blip

        return Blip(source, decoding, instruction)
    if kind == "blip-2":
        from data_tools.captioning.blip2 import Blip2

        return Blip2(source, decoding, instruction)
    if kind == "florence2":
        from data_tools.captioning.florence2 import Florence2

        return Florence2(source, decoding, instruction)
    from data_tools.captioning.chat import Chat

    return Chat(source, decoding, instruction)
