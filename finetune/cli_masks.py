"""``finetune data masks``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def masks(
    source: Annotated[Path, typer.Argument(metavar="FOLDER|PICTURE", help="Pictures.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the masks.", show_default=False)],
    threshold: Annotated[
        str | None,
        typer.Option(
            help="What differs from a plain background: border, or what is dark or light.", show_default=False
        ),
    ] = None,
    alpha: Annotated[bool, typer.Option("--alpha", help="The pictures' own transparency.")] = False,
    text: Annotated[str | None, typer.Option(help="What these words name, by CLIPSeg.", show_default=False)] = None,
    points: Annotated[
        str | None, typer.Option(help='What these points are on, by SAM: "120,80 0.5,0.5".', show_default=False)
    ] = None,
    negative: Annotated[
        str | None, typer.Option(help="Points that are not on the subject.", show_default=False)
    ] = None,
    box: Annotated[
        str | None, typer.Option(help="Left, top, right, bottom of the subject.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Points and boxes of each picture, a JSON line each.", show_default=False)
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="A picture whose mask is carried over by SAM.", show_default=False)
    ] = None,
    reference_mask: Annotated[Path | None, typer.Option(help="Its mask.", show_default=False)] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="SAM, SAM 2 or CLIPSeg, by name or folder; a SAM beside a CLIPSeg draws outlines.",
            show_default="facebook/sam-vit-base; for words CIDAS/clipseg-rd64-refined",
        ),
    ] = None,
    cut: Annotated[float, typer.Option(min=0.01, max=1, help="Value from which a pixel counts.")] = 0.5,
    soft: Annotated[bool, typer.Option("--soft", help="Keep the values of those that do.")] = False,
    largest: Annotated[bool, typer.Option("--largest", help="Keep the largest connected part.")] = False,
    fill: Annotated[bool, typer.Option("--fill", help="Close holes.")] = False,
    grow: Annotated[int, typer.Option(help="Pixels wider on all sides; negative: narrower.")] = 0,
    feather: Annotated[float, typer.Option(min=0, help="Radius of a blur of the edge, in pixels.")] = 0.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make masks anew that are there.")] = False,
    sheet: Annotated[
        Path | None, typer.Option(help="A .html or .png file with outlines to look at.", show_default=False)
    ] = None,
) -> None:
    """Make masks of a subject for data.concepts.N.masks. Ends with 2 where a picture has none in the end."""
    from data_tools.masking import command
    from data_tools.masking.choice import Asked
    from data_tools.masking.shape import Shape

    asked = Asked(
        threshold=threshold,
        alpha=alpha,
        text=text,
        points=points,
        negative=negative,
        box=box,
        prompts=prompts,
        reference=reference,
        reference_mask=reference_mask,
        models=tuple(model or ()),
    )
    shape = Shape(cut=cut, soft=soft, largest=largest, fill=fill, grow=grow, feather=feather)
    if not command.run(source, out, asked, shape, overwrite, sheet):
        raise typer.Exit(2)
