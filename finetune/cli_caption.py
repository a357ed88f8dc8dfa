"""``finetune data caption`` and ``finetune data score``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from data_tools.captioning.todo import Where


Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Pictures.", show_default=False)]
Model = Annotated[str, typer.Option(help="A folder, a name of the Hugging Face hub, or tinyworld.", show_default=False)]
Revision = Annotated[str | None, typer.Option(help="Of a hub model.", show_default="its newest")]
Recursive = Annotated[bool, typer.Option("--recursive", help="Those in folders below it too.")]
LongestSide = Annotated[int, typer.Option(min=32, help="Pixels; larger pictures are scaled down before.")]


def caption(
    folder: Folder,
    model: Model,
    revision: Revision = None,
    instruction: Annotated[
        str | None, typer.Option(help="What a chat model is told, a Florence-2 task, or a BLIP opening.")
    ] = None,
    trigger: Annotated[str | None, typer.Option(help="The subject's own word, put into every caption.")] = None,
    class_word: Annotated[str | None, typer.Option(help="The word that the trigger goes before: dog.")] = None,
    template: Annotated[str, typer.Option(help="With {caption}, and {trigger} where it goes.")] = "{caption}",
    out: Annotated[
        Literal["sidecar", "jsonl"], typer.Option(help="A .txt beside each picture, or metadata.jsonl of the folder.")
    ] = "sidecar",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace captions; the old text is kept.")] = False,
    recursive: Recursive = False,
    masks: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|alpha", help="Masks with the pictures' names, or their own transparency."),
    ] = None,
    describe: Annotated[
        Literal["subject", "background"], typer.Option(help="What of a masked picture is looked at.")
    ] = "subject",
    longest_side: LongestSide = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a caption.")] = 100,
    beams: Annotated[int, typer.Option(min=1, help="Of a beam search; 1 takes the likeliest token each time.")] = 1,
    candidates: Annotated[int, typer.Option(min=1, help="Captions, of which --clip takes the nearest.")] = 1,
    clip: Annotated[str | None, typer.Option(help="A CLIP or SigLIP for --candidates and --phrases.")] = None,
    phrases: Annotated[Path | None, typer.Option(help="A file with one a line, for pictures they fit.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Phrases of a picture.")] = 5,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of sampled candidates.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Of sampled candidates.")] = 0.9,
    seed: Annotated[int, typer.Option(min=0, help="Of sampled candidates.")] = 0,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Of a tagger's general tags.")] = 0.35,
    character_threshold: Annotated[float, typer.Option(min=0, max=1, help="Of its names of characters.")] = 0.85,
    precision: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of the model's weights.")
    ] = "auto",
    device: Annotated[Literal["auto", "cpu"], typer.Option(help="Where models compute.")] = "auto",
    preview: Annotated[int | None, typer.Option(min=1, help="Print so many captions and write none.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Name what would be captioned; loads no model.")] = False,
) -> None:
    """Let a model caption the pictures that have no caption. Ends with 2 where some got none."""
    from data_tools.captioning.captioner import Decoding
    from data_tools.captioning.describing import Means
    from data_tools.captioning.pictures import View
    from data_tools.captioning.tagger import Thresholds
    from data_tools.captioning.todo import Where
    from data_tools.captioning.words import Wording

    leave_out = Path(masks) if masks not in (None, "alpha") else None
    where = Where(folder, out, overwrite, recursive, leave_out)
    view = View(masks, describe, longest_side)
    wording = Wording(trigger, class_word, template)
    means = Means(
        model=model,
        revision=revision,
        instruction=instruction,
        decoding=Decoding(max_new_tokens, beams, temperature, top_p),
        thresholds=Thresholds(threshold, character_threshold),
        precision=precision,
        candidates=candidates,
        clip=clip,
        phrases=phrases,
        top=top,
        seed=seed,
    )
    if dry_run:
        _name(where)
        return
    from data_tools.captioning.run import caption as write_captions

    done = write_captions(where, means, wording, view, batch_size, preview, device)
    if done.main:
        _refuse(done.refused)
        if done.full:
            typer.echo(
                f"{done.full} captions took all {max_new_tokens} tokens and may lack their end: --max-new-tokens"
            )
        typer.echo(f"{done.written} captions {'written' if preview is None else 'shown'}, {done.had} were there")
    if done.refused:
        raise typer.Exit(2)


def score(
    folder: Folder,
    model: Model,
    revision: Revision = None,
    recursive: Recursive = False,
    longest_side: LongestSide = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 16,
    below: Annotated[float | None, typer.Option(help="Only captions that score less.", show_default="all")] = None,
    device: Annotated[Literal["auto", "cpu"], typer.Option(help="Where the model computes.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say how well captions fit their pictures by CLIP or SigLIP, the worst first."""
    from data_tools.captioning.pictures import View
    from data_tools.captioning.score import score as scores_of

    view = View(longest_side=longest_side)
    found = scores_of(folder, model, revision, recursive, view, batch_size, device)
    if found.main:
        shown = [one for one in found.all if below is None or one.cosine < below]
        if as_json:
            rows = [{"score": one.cosine, "picture": one.picture, "caption": one.caption} for one in shown]
            typer.echo(
                json.dumps(
                    {"scores": rows, "without": found.without, "refused": found.refused}, indent=2, ensure_ascii=False
                )
            )
        else:
            for one in shown:
                typer.echo(f"{one.cosine:.3f} {one.picture}: {one.caption}")
            _refuse(found.refused)
            typer.echo(f"{len(found.all)} captions scored, {found.without} pictures have none")
    if found.refused:
        raise typer.Exit(2)


def _name(where: Where) -> None:
    """Say what would be captioned."""
    from data_tools.captioning.todo import Todo

    where.check()
    todo = Todo(where)
    for path in todo:
        typer.echo(path)
    _refuse(todo.refused)
    typer.echo(f"{todo.wanted} pictures would be captioned, {todo.had} have a caption")
    if todo.refused:
        raise typer.Exit(2)


def _refuse(sentences: Sequence[str]) -> None:
    for sentence in sentences:
        typer.echo(f"passed over: {sentence}")
