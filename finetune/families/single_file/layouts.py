"""What a single file of each architecture looks like."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.families.parts import read_json
from finetune.originals import Place, Places, flux, open_clip, sd3, unet, vae, weight

DENOISER = "model.diffusion_model."


@dataclass(frozen=True)
class Component:
    """A network within a file.

    Attributes:
        prefix: of its keys.
        table: of ``finetune.originals``, by the network's settings; None where the names are those of transformers.
        level: in front of all names of CLIPs; some versions of transformers leave it out.
        identity: weights that are the identity where the file has none.
        copies: names under which files hold a weight again -> its own.
    """

    prefix: str
    table: Callable[[Mapping[str, Any]], Places] | None = None
    level: str = ""
    identity: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)

    def full(self, name: str) -> str:
        """A weight's name with its ``level``."""
        return name if name.startswith((self.level, "text_projection.")) else self.level + name

    def places(self, names: Iterable[str], settings: Mapping[str, Any]) -> dict[str, Place | None]:
        """Where weights stand in the file, by their names in diffusers' files; None what has no place there."""
        table = self.table(settings) if self.table else None
        found = {}
        for name in names:
            place = Place(self.full(name)) if table is None else weight(table, self.full(name))
            found[name] = place and replace(place, path=self.prefix + place.path)
        return found


@dataclass(frozen=True, eq=False)
class Layout:
    """A single file of one architecture.

    Attributes:
        name: what people call it.
        family: of ``finetune.families``.
        pipeline: diffusers' class.
        code: whose names the layers have.
        components: by subfolder of a diffusers folder; the first is the denoiser.
        mark: how a key begins that no other architecture's files have.
        first: the denoiser's layer that reads latents.
        channels: how many numbers it reads at most, where it reads nothing but latents.
        renamed: prefixes that other tools have -> those of ``components``.
        flow: whether it was trained with flow matching.
    """

    name: str
    family: str
    pipeline: str
    code: str
    components: Mapping[str, Component]
    mark: str
    first: str
    channels: int
    renamed: Mapping[str, str] = field(default_factory=dict)
    flow: bool = False

    def places(self, subfolder: str, names: Iterable[str], settings: Mapping[str, Any]) -> dict[str, Place]:
        """Where the weights of one network stand in the file, by their names in diffusers' files.

        Raises:
            UserError: a weight has no place, because the network is none of this architecture.
        """
        found: dict[str, Place] = {}
        for name, place in self.components[subfolder].places(names, settings).items():
            if place is None:
                raise UserError(f"{subfolder}: {name!r} has no place in a single file of {self.name}")
            found[name] = place
        return found


_STABILITY = "https://github.com/Stability-AI/generative-models"  # ModelSpec's for Stable Diffusion 1 and 2 too
_UNET = {"unet": Component(DENOISER, unet.places), "vae": Component("first_stage_model.", vae.places)}
_FIRST = f"{DENOISER}input_blocks.0.0.weight"
_T5 = Component("text_encoders.t5xxl.transformer.", copies={"encoder.embed_tokens.weight": "shared.weight"})


def _clip(prefix: str, **settings: Any) -> Component:
    return Component(prefix, level="text_model.", **settings)


SD1 = Layout(
    name="Stable Diffusion 1.x",
    family="sd",
    pipeline="StableDiffusionPipeline",
    code=_STABILITY,
    components={**_UNET, "text_encoder": _clip("cond_stage_model.transformer.")},
    mark="cond_stage_model.transformer.",
    first=_FIRST,
    channels=4,
)
SD2 = replace(
    SD1,
    name="Stable Diffusion 2.x",
    components={**_UNET, "text_encoder": _clip("cond_stage_model.model.", table=open_clip.places)},
    mark="cond_stage_model.model.",
)
SDXL = replace(
    SD1,
    name="Stable Diffusion XL",
    family="sdxl",
    pipeline="StableDiffusionXLPipeline",
    components={
        **_UNET,
        "text_encoder": _clip("conditioner.embedders.0.transformer."),
        "text_encoder_2": _clip("conditioner.embedders.1.model.", table=open_clip.places),
    },
    mark="conditioner.embedders.1.model.",
)
SD3 = Layout(
    name="Stable Diffusion 3",
    family="sd3",
    pipeline="StableDiffusion3Pipeline",
    code="https://github.com/Stability-AI/sd3.5",
    components={
        "transformer": Component(DENOISER, sd3.places),
        "vae": Component("first_stage_model.", vae.places),
        "text_encoder": _clip("text_encoders.clip_l.transformer.", identity=("text_projection.weight",)),
        "text_encoder_2": _clip("text_encoders.clip_g.transformer."),
        "text_encoder_3": _T5,
    },
    mark=f"{DENOISER}joint_blocks.0.",
    first=f"{DENOISER}x_embedder.proj.weight",
    channels=16,
    renamed={"vae.": "first_stage_model."},
    flow=True,
)
FLUX = Layout(
    name="FLUX.1",
    family="flux",
    pipeline="FluxPipeline",
    code="https://github.com/black-forest-labs/flux",
    components={
        "transformer": Component(DENOISER, flux.places),
        "vae": Component("vae.", vae.places),
        "text_encoder": _clip("text_encoders.clip_l.transformer."),
        "text_encoder_2": _T5,
    },
    mark=f"{DENOISER}double_blocks.0.img_mod.",  # FLUX.2 has one modulation for all blocks, Chroma none
    first=f"{DENOISER}img_in.weight",
    channels=64,
    renamed={"first_stage_model.": "vae."},
    flow=True,
)
LAYOUTS = (SD1, SD2, SDXL, SD3, FLUX)


def layout_of(folder: Path) -> Layout | None:
    """The layout for what a diffusers folder holds; None where there is none."""
    pipeline = read_json(folder / "model_index.json").get("_class_name")
    if pipeline == SD1.pipeline:
        # OpenAI's CLIP was trained with an approximation of this function, OpenCLIP's with the function itself
        act = read_json(folder / "text_encoder" / "config.json").get("hidden_act")
        return SD2 if act == "gelu" else SD1
    return next((layout for layout in LAYOUTS if layout.pipeline == pipeline), None)
