"""What a single file of each architecture looks like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UserError
from finetune.families.folder import read_json
from finetune.families.originals import clip, unet, vae
from finetune.families.originals.place import Place, PlaceOf, Settings


@dataclass(frozen=True)
class Component:
    """A network within a file.

    Attributes:
        prefix: of its keys.
        place: of its weights behind the prefix.
    """

    prefix: str
    place: PlaceOf


@dataclass(frozen=True, eq=False)
class Layout:
    """A single file of one architecture.

    Attributes:
        name: what people call it.
        family: of ``finetune.families``.
        pipeline: diffusers' class.
        components: by subfolder of a diffusers folder.
        width: of a prompt's token vectors in the published model.
    """

    name: str
    family: str
    pipeline: str
    components: Mapping[str, Component]
    width: int

    @property
    def mark(self) -> str:
        """The prefix that no other architecture's files have: that of the last text encoder."""
        return list(self.components.values())[-1].prefix

    def places(self, subfolder: str, names: Iterable[str], settings: Settings) -> dict[str, Place]:
        """Where the weights of one network stand in the file, by their names in diffusers' file.

        Raises:
            UserError: a weight has no place, because the network is none of this architecture.
        """
        component, found = self.components[subfolder], {}
        for name in names:
            place = component.place(name, settings)
            if place is None:
                raise UserError(f"{subfolder}: {name!r} has no place in a single file of {self.name}")
            found[name] = place.below(component.prefix)
        return found


_UNET = Component("model.diffusion_model.", unet.place)
_VAE = Component("first_stage_model.", vae.place)

SD1 = Layout(
    "Stable Diffusion 1.x",
    "sd",
    "StableDiffusionPipeline",
    {"unet": _UNET, "vae": _VAE, "text_encoder": Component("cond_stage_model.transformer.", clip.openai)},
    768,
)
SD2 = Layout(
    "Stable Diffusion 2.x",
    "sd",
    "StableDiffusionPipeline",
    {"unet": _UNET, "vae": _VAE, "text_encoder": Component("cond_stage_model.model.", clip.openclip)},
    1024,
)
SDXL = Layout(
    "Stable Diffusion XL",
    "sdxl",
    "StableDiffusionXLPipeline",
    {
        "unet": _UNET,
        "vae": _VAE,
        "text_encoder": Component("conditioner.embedders.0.transformer.", clip.openai),
        "text_encoder_2": Component("conditioner.embedders.1.model.", clip.openclip),
    },
    2048,
)
LAYOUTS = (SD1, SD2, SDXL)


def layout_of(folder: Path) -> Layout | None:
    """The layout for what a diffusers folder holds; None where there is none."""
    pipeline = read_json(folder / "model_index.json").get("_class_name")
    if pipeline == SDXL.pipeline:
        return SDXL
    if pipeline != SD1.pipeline:
        return None
    # OpenAI's CLIP was trained with an approximation of this function, OpenCLIP's with the function itself
    return SD2 if read_json(folder / "text_encoder" / "config.json").get("hidden_act") == "gelu" else SD1
