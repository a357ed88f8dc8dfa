"""``finetune data …``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from finetune import cli_caption, cli_masks

app = typer.Typer(no_args_is_help=True)
app.command()(cli_caption.caption)
app.command()(cli_caption.score)
app.command()(cli_masks.masks)

Source = Annotated[Path, typer.Argument(metavar="FOLDER|RECIPE", help="Pictures, or a recipe.", show_default=False)]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, a YAML file.", show_default=False)]
Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Pictures, in folders below it too.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]…", help="Settings of the recipe that win.", show_default=False),
]


@app.command()
def doctor(
    source: Source,
    overrides: Overrides = None,
    page: Annotated[Path | None, typer.Option(help="Write it as a page with the pictures.", show_default=False)] = None,
    resolution: Annotated[int, typer.Option(min=8, help="Of a folder; a recipe has its own.")] = 512,
    strict: Annotated[bool, typer.Option("--strict", help="End with 2 for doubtful things too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that decode.", show_default="as many as cores")
    ] = None,
) -> None:
    """Say what is wrong with pictures and captions. Ends with 2 where a run would be refused."""
    from data_tools.doctor import diagnose
    from data_tools.doctor_page import page as as_page
    from data_tools.doctor_page import verdict
    from finetune.files import write_text

    found = diagnose(source, overrides or [], resolution, workers)
    if page:
        write_text(page, as_page(found))
    if as_json:
        typer.echo(json.dumps(found.plain(), indent=2, ensure_ascii=False))
    else:
        for finding in found.findings:
            typer.echo(f"{finding.level}: {finding.text}")
        for shape in found.shapes:
            cut = f"{100 * shape.cut_away:.0f} % cut away"
            typer.echo(f"shape: {shape.width} x {shape.height}: {shape.pictures} pictures, {cut}")
        typer.echo(verdict(found) + (f" {page}" if page else ""))
    if found.at("refused") or (strict and found.at("doubtful")):
        raise typer.Exit(2)


@app.command()
def sheet(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="A .html or .png file.")] = Path("sheet.html"),
    count: Annotated[int, typer.Option(min=1, help="Draws to show.")] = 48,
) -> None:
    """Show what the model will see: crops, masks and captions of a run's first draws. Loads no weights."""
    from data_tools.sheet import draws, write
    from finetune.config import read_recipe

    resolved = read_recipe(recipe, overrides or [])
    typer.echo(write(out, draws(resolved, count), str(recipe)))


@app.command()
def dedupe(
    folder: Folder,
    move: Annotated[
        Path | None, typer.Option(help="Move all but the best of each group there.", show_default="list only")
    ] = None,
    distance: Annotated[int, typer.Option(min=0, max=8, help="Bits in which hashes of copies may differ.")] = 4,
    workers: Annotated[int, typer.Option(min=1, help="Processes that decode.")] = 1,
) -> None:
    """Find copies of pictures, scaled or compressed anew ones too. Deletes nothing."""
    from data_tools.dedupe import find
    from data_tools.dedupe import move as move_away

    groups, problems = find(folder, distance, workers)
    for problem in problems:
        typer.echo(f"passed over: {problem}")
    for group in groups:
        kind = "the same file" if group.same else "a copy"
        for other in group.others:
            typer.echo(f"{other}: {kind} of {group.best}")
    moved = move_away(groups, folder, move) if move else []
    others = sum(len(group.others) for group in groups)
    typer.echo(f"{others} copies of {len(groups)} pictures" + (f", {len(moved)} moved to {move}" if move else ""))


@app.command()
def shard(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="Folder of the shards.", show_default=False)],
    format: Annotated[Literal["webdataset", "parquet"], typer.Option(help="Tars, or tables.")] = "webdataset",
    size: Annotated[str, typer.Option(help="Most bytes of pictures in a shard.")] = "256MB",
    count: Annotated[int | None, typer.Option(min=1, help="Pictures in a shard.", show_default="by size")] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder of their masks.", show_default="no masks")] = None,
    leave_out_broken: Annotated[
        bool, typer.Option("--leave-out-broken", help="Leave out what is broken, and name it in the index.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads, each at a shard of its own.", show_default="as many as cores")
    ] = None,
) -> None:
    """Pack pictures, captions and masks into WebDataset tars or Parquet. Goes on where it was interrupted."""
    from data_tools import sharding

    settings = sharding.Settings(
        format=format, size=sharding.parse_size(size), count=count, masks=masks, leave_out=leave_out_broken
    )
    done = sharding.shard(folder, out, settings, workers)
    for problem in done.problems:
        typer.echo(f"left out: {problem}")
    if without := sum(record.without_caption for record in done.records):
        typer.echo(f"{without} pictures have no caption")
    pictures, total = (sum(getattr(record, what) for record in done.records) for what in ("pictures", "bytes"))
    there = len(done.records) - done.written
    typer.echo(
        f"{out}: {pictures} pictures in {len(done.records)} shards, {total / 1e6:.1f} MB; "
        f"{done.written} written, {there} were there"
    )


@app.command()
def cache(
    recipe: RecipeFile,
    overrides: Overrides = None,
    prune: Annotated[
        int | None,
        typer.Option(
            min=2, metavar="DAYS", help="Then remove what no run has used for so many days.", show_default=False
        ),
    ] = None,
) -> None:
    """Encode a recipe's pictures and captions beforehand, without a denoiser in memory while it does."""
    from data_tools import caches
    from finetune.config import read_recipe

    read = read_recipe(recipe, overrides or [])
    found = caches.fill(read)
    if not found:
        return
    for what in caches.KINDS:
        if f"{what}_made" in found:
            made, there, damaged = (found[f"{what}_{how}"] for how in ("made", "read", "damaged"))
            packs, size = caches.size(read, what)
            said = f"{what}: {made} made, {there} were there" + (f", {damaged} were damaged" if damaged else "")
            typer.echo(f"{said}; {packs} {'pack' if packs == 1 else 'packs'}, {size / 1e6:.1f} MB")
    if prune is not None:
        count, size = caches.prune(read, prune)
        typer.echo(f"{count} files removed that no run has used for {prune} days, {size / 1e6:.1f} MB")


@app.command("class-images")
def class_images(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="A recipe that needs them.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    prompt: Annotated[str | None, typer.Option(help="What to draw, without a recipe.", show_default=False)] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of such, one on a line.", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the images; of --prompts, of a folder for each.", show_default=False)
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images of each prompt.")] = 100,
    model: Annotated[str, typer.Option(help="A diffusers folder or a hub name.")] = "tinyworld",
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(min=0, help="Scale of classifier-free guidance.")] = 5.0,
    scheduler: Annotated[str | None, typer.Option(help="Of diffusers.", show_default="the model's own")] = None,
    size: Annotated[int | None, typer.Option(min=8, help="Side in pixels.", show_default="the model's own")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images drawn at a time.")] = 8,
) -> None:
    """Draw a recipe's class images beforehand, or those of a prompt without a recipe. Draws what is missing."""
    from finetune.errors import UserError

    asked = prompt is not None or prompts is not None
    if recipe is not None and (asked or out is not None):
        raise UserError("a recipe says what is drawn and where: give either a recipe, or --prompt and --out")
    if recipe is not None:
        drawn = _of_recipe(recipe, overrides or [])
    elif out is None or (prompt is None) == (prompts is None):
        raise UserError("give a recipe, or what to draw and where: --prompt (or a file of --prompts) and --out")
    else:
        from data_tools import class_images as tool
        from finetune.config.schema import ModelConfig, SamplerConfig
        from finetune.data.drawing import Drawing

        wanted = {out: prompt} if prompt is not None else tool.folders(tool.read_prompts(prompts or Path()), out)
        sampler = SamplerConfig(steps=steps, guidance=guidance, scheduler=scheduler)
        drawing = Drawing(count=count, sampler=sampler, resolution=size, seed=seed, batch_size=batch_size)
        drawn = {folder: len(paths) for folder, paths in tool.draw(wanted, ModelConfig(path=model), drawing).items()}
    for folder, number in drawn.items():
        typer.echo(f"{folder}: {number} class images")


def _of_recipe(recipe: Path, overrides: list[str]) -> Mapping[Path, int]:
    """How many class images of a recipe are in each folder, once the missing ones are drawn."""
    from data_tools.caches import draw_class_images
    from finetune.config import read_recipe

    pictures = draw_class_images(read_recipe(recipe, overrides))
    return Counter(Path(str(picture.path)).parent for picture in pictures)
