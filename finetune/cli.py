"""``finetune …``: every verb is a few lines that call the module which does the work, imported only then."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import finetune
from finetune.config.command import exit_codes

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune diffusion models: LoRA, DreamBooth with prior preservation, full and partial fine-tuning.",
    epilog="Exit codes: 0 done; 2 bad recipe or data; 3 stopped by a signal, resumable; 4 a guard of the run.",
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]…", help="Settings that win: train.steps=200.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


def main() -> None:
    """Entry point of the console script."""
    with exit_codes():
        app()


def _version(asked: bool) -> None:
    if asked:
        typer.echo(finetune.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it and end.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    launch: Annotated[
        str | None,
        typer.Option(help="A launch profile: a name of launch/accelerate, such as cpu-2, or a file of accelerate's."),
    ] = None,
) -> None:
    """Run a recipe; run it again to continue where it stopped."""
    from finetune.config.command import launch_recipe, run_recipe

    if launch is None:
        run_recipe(recipe, overrides or [])
    else:
        launch_recipe(recipe, overrides or [], launch)


@app.command()
def validate(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Check a recipe alone: no model, no pictures. Ends with 2 and file:line of every mistake."""
    from finetune.config import read_recipe
    from finetune.config.summary import summary

    typer.echo(f"ok: {summary(read_recipe(recipe, overrides or []))}")


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the reference in docs/recipes.md.")] = False,
) -> None:
    """What a recipe may say, as a JSON Schema for editors."""
    from finetune.config import reference

    typer.echo(reference.markdown() if markdown else reference.json_schema(), nl=False)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="That the run will be launched on.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Say what a recipe would do: pictures, steps, class images, memory, files. Loads no weights."""
    import dataclasses
    import json

    from rich.console import Console

    from finetune.config import read_recipe

    resolved = read_recipe(recipe, overrides or [])  # before anything slow is imported
    from finetune import plan as plans

    found = plans.plan(resolved, processes)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        plans.render(found, Console())
