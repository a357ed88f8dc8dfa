"""``finetune tinyworld …``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)

Seed = Annotated[int, typer.Option(help="Which one; nobody has tuned anything to a new number.", show_default=False)]
Model = Annotated[str, typer.Option(help="Which of the shipped bases: tinyworld or tinyworld-flow.")]
Out = Annotated[Path, typer.Option(help="A new or empty folder.", show_default=False)]


@app.command()
def subject(seed: Seed, out: Out) -> None:
    """Draw a never-seen subject: 5 pictures, masks, captions, a held-out set."""
    from finetune.tinyworld.commands import write_subject

    typer.echo(f"{len(write_subject(seed, out))} files in {out}")


@app.command()
def style(seed: Seed, out: Out) -> None:
    """Draw a style: captioned pictures and a held-out set."""
    from finetune.tinyworld.commands import write_style

    typer.echo(f"{len(write_style(seed, out))} files in {out}")


@app.command()
def captions(
    count: Annotated[int, typer.Option(help="How many.")] = 20,
    out: Annotated[Path | None, typer.Option(help="A file of JSON lines.", show_default="the screen")] = None,
) -> None:
    """Captions that the base never saw, with what each of them names."""
    from finetune.tinyworld.commands import write_captions

    found = write_captions(count, out)
    typer.echo(f"{count} captions in {out}" if out else "\n".join(json.dumps(line) for line in found))


@app.command()
def sheet(
    out: Annotated[Path, typer.Option(help="A .png file.", show_default=False)],
    prompts: Annotated[list[str] | None, typer.Argument(help="Unseen captions where none are given.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    model: Model = "tinyworld",
) -> None:
    """A sheet of a base model's pictures."""
    from finetune.tinyworld.commands import write_samples

    typer.echo(write_samples(out, prompts or None, seed=seed, model=model))


@app.command()
def gates(
    count: Annotated[int, typer.Option(min=1, help="Captions that the base is asked.")] = 200,
    model: Model = "tinyworld",
) -> None:
    """Check that the judge can be trusted and that a base follows its prompts. Ends with 4 where one can't."""
    from finetune.errors import GuardError
    from finetune.tinyworld.commands import check_gates

    found, accuracy = check_gates(model, count)
    for gate in found:
        typer.echo(f"{'ok  ' if gate.passed else 'FAIL'}  {gate.name}: {gate.value:.3f} (limit {gate.limit})")
    typer.echo(", ".join(f"{name} {value:.3f}" for name, value in accuracy.items()))
    if failed := [gate.name for gate in found if not gate.passed]:
        raise GuardError(f"gates not passed: {', '.join(failed)}")


@app.command()
def build_base(
    work: Annotated[Path, typer.Option(help="Pictures, latents and checkpoints; call again to resume.")],
    out: Annotated[Path | None, typer.Option(help="Folder.", show_default="the package's own")] = None,
    scale: Annotated[float, typer.Option(help="Of the steps of every stage; 1 is as shipped.")] = 1.0,
) -> None:
    """Train the base model and the judge again."""
    from finetune.tinyworld import commands

    commands.build_base(work, out, scale=scale)


@app.command()
def build_flow(
    work: Annotated[Path, typer.Option(help="Latents, prompts and checkpoints; call again to resume.")],
    out: Annotated[Path | None, typer.Option(help="Folder.", show_default="the package's own")] = None,
    scale: Annotated[float, typer.Option(help="Of the steps; 1 is as shipped.")] = 1.0,
) -> None:
    """Train the denoiser of tinyworld-flow again; text encoder and autoencoder are those that are shipped."""
    from finetune.tinyworld import commands

    commands.build_flow(work, out, scale=scale)
