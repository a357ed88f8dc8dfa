"""Adapters after training: ``finetune convert``, ``merge``, ``extract``, ``resize``, ``prune``, ``push``, ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from finetune.config.schema import ModelConfig

File = Annotated[
    Path,
    typer.Argument(
        metavar="FILE", help="An adapter of any trainer, a folder of PEFT's, or a run's folder.", show_default=False
    ),
]
Out = Annotated[Path, typer.Option(help="File to write; none is overwritten.", show_default=False)]
Base = Annotated[
    str | None, typer.Option(help="The base model, as model.path in a recipe.", show_default="what the file says")
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, float16 or bfloat16.", show_default="that of the numbers as they are")
]
Layout = Annotated[str | None, typer.Option("--to", help="diffusers or kohya.", show_default="the first file's")]
Rank = Annotated[int | None, typer.Option(min=1, help="At most so many.", show_default="no limit")]
Energy = Annotated[
    float | None, typer.Option(help="Share of the squares of singular values to keep.", show_default=False)
]
Frobenius = Annotated[float | None, typer.Option(help="Share of the norm to keep (sv_fro).", show_default=False)]
Cumulative = Annotated[
    float | None, typer.Option(help="Share of the sum of singular values to keep (sv_cumulative).", show_default=False)
]
Ratio = Annotated[
    float | None, typer.Option(help="Of the largest singular value to the smallest (sv_ratio).", show_default=False)
]


def convert(
    file: File,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="LoRA: diffusers, kohya, difference. LoHa and LoKr: kohya, peft. Words, hypernetworks: diffusers, "
            "a1111.",
            show_default=False,
        ),
    ],
    out: Out,
    dtype: Dtype = None,
    base: Base = None,
) -> None:
    """Write an adapter of any trainer in another layout, without loss."""
    from finetune.export.tools.convert import convert as write

    _judge(write(file, out, to, dtype=dtype, base=base), base)


def merge(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Adapters of one base model.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="File, or with --into a folder, to write.", show_default=False)],
    into: Annotated[
        str | None, typer.Option(help="A model to put them into, as model.path.", show_default="an adapter is written")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="concat: exact, ranks add up. svd: cut off at a rank. sum: factors are added. ties, dare-sum, "
            "dare-ties."
        ),
    ] = "concat",
    weights: Annotated[str | None, typer.Option(help="One for each file, with commas.", show_default="all 1")] = None,
    strength: Annotated[float, typer.Option(help="With --into: of the merged change.")] = 1.0,
    rank: Annotated[int | None, typer.Option(min=1, help="Of svd, ties, dare.", show_default="the largest")] = None,
    density: Annotated[
        float | None, typer.Option(help="Of ties: share of numbers that is kept.", show_default="0.2")
    ] = None,
    drop: Annotated[
        float | None, typer.Option(help="Of dare: probability that a number is dropped.", show_default="0.5")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of dare.", show_default="0")] = None,
    to: Layout = None,
    dtype: Dtype = None,
    base: Base = None,
) -> None:
    """Merge adapters with each other, or with --into into a model."""
    from finetune.export.tools import merge as adapters
    from finetune.export.tools.merge_into import merge_into
    from finetune.export.tools.method import Method

    dare = {"drop": drop, "seed": seed}
    no_part = {"density": density} if method != "ties" else {}
    no_part |= dare if not method.startswith("dare") else {}
    _refuse({f"--{name}": value for name, value in no_part.items()}, f"has no part in --method {method}")
    given = {name: value for name, value in {"density": density, **dare}.items() if value is not None}
    asked = Method(method, _numbers(weights, len(files)), **given)  # type: ignore[arg-type]
    if into is not None:
        _refuse({"--rank": rank, "--to": to, "--base": base}, "is for merging adapters with each other, not --into")
        baked = merge_into(files, into, out, asked, strength=strength, dtype=dtype)
        typer.echo(f"{baked.path}: {baked.weights} weights changed")
        _judge(out, None)
        return
    _refuse({"--strength": None if strength == 1.0 else strength}, "is for --into; give --weights")
    made = adapters.merge(files, out, asked, to=to, rank=rank, dtype=dtype, base=base)
    typer.echo(f"{made.path}: {made.kept:.2%} of the merged change's squares")
    _judge(out, base)


def extract(
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="A model, as model.path.", show_default=False)],
    base: Annotated[str, typer.Argument(metavar="BASE", help="What it was trained from.", show_default=False)],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    frobenius: Frobenius = None,
    cumulative: Cumulative = None,
    ratio: Ratio = None,
    to: Annotated[str, typer.Option("--to", help="diffusers or kohya.")] = "diffusers",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
) -> None:
    """Write the difference of two models as a LoRA."""
    from finetune.export.tools.extract import extract as write
    from finetune.export.tools.lowrank import Rule

    made = write(tuned, base, out, Rule(rank, energy, frobenius, cumulative, ratio), to=to, dtype=dtype)
    ranks = sorted(made.ranks.values())
    typer.echo(f"{made.path}: {len(ranks)} layers of rank {ranks[0]} to {ranks[-1]}, {made.kept:.2%} of the squares")
    if made.left:
        typer.echo(f"left out: {len(made.left)} weights that no LoRA has a place for differ, such as {made.left[0]}")
    _judge(out, base)


def resize(
    file: File,
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    frobenius: Frobenius = None,
    cumulative: Cumulative = None,
    ratio: Ratio = None,
    to: Layout = None,
    dtype: Dtype = None,
    base: Base = None,
) -> None:
    """Write a LoRA with other ranks, each layer cut off behind its largest singular values."""
    from finetune.export.tools.lowrank import Rule
    from finetune.export.tools.resize import resize as write

    rule = Rule(rank, energy, frobenius, cumulative, ratio)
    made = write(file, out, rule, to=to, dtype=dtype, base=base)
    before, after = (sorted(pair[place] for pair in made.ranks.values()) for place in (0, 1))
    said = f"rank {before[0]} to {before[-1]} became {after[0]} to {after[-1]}"
    typer.echo(f"{made.path}: {said}, {made.kept:.2%} of the squares, {made.kept**0.5:.2%} of the norm")
    _judge(out, base)


def prune(
    file: File,
    out: Out,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Layers that stay, 'unet.up_blocks.1'; may be given several times.", show_default="all"),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(help="Layers that go, 'text_encoder'; may be given several times.", show_default="none"),
    ] = None,
    base: Base = None,
) -> None:
    """Write an adapter without some of its layers."""
    from finetune.export.tools.prune import prune as write

    made = write(file, out, keep=keep or (), drop=drop or (), base=base)
    typer.echo(f"{made.path}: {len(made.kept)} layers kept, {len(made.dropped)} dropped")
    _judge(out, base)


def push(
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER", help="An adapter file, a model folder or a run's folder.", show_default=False
        ),
    ],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On the hub.", show_default=False)],
    dry_run: Annotated[
        Path | None,
        typer.Option(help="New folder to write what would be uploaded to, and do no more.", show_default="upload"),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="For yourself alone.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch.", show_default="main")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.", show_default="names of the files")] = None,
    license: Annotated[
        str | None, typer.Option(help="Identifier of the hub, 'openrail++'.", show_default="none")
    ] = None,
    picture: Annotated[
        list[Path] | None,
        typer.Option(help="For the card; may be given several times.", show_default="the run's last previews"),
    ] = None,
    base: Base = None,
) -> None:
    """Upload an adapter or a run to the Hugging Face hub, with a model card, in one commit."""
    from finetune.publish.push import prepare, write
    from finetune.publish.push import push as upload

    made = prepare(adapter, repository, base=base, license=license, pictures=picture or ())
    for note in made.notes:
        typer.echo(f"note: {note}")
    if dry_run is not None:
        for name in write(made, dry_run):
            typer.echo(dry_run / name)
        return
    typer.echo(upload(made, private=private, revision=revision, message=message))


def demo(
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER", help="An adapter file, a model folder or a run's folder.", show_default=False
        ),
    ],
    base: Base = None,
    strengths: Annotated[
        str | None, typer.Option(help="Filled in, with commas.", show_default="0,0.5,1, or what the adapter has")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the base: float32, bfloat16 or float16.")] = "float32",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the page, on this machine alone.")] = 7860,
) -> None:
    """Open a page that draws a prompt at several strengths of an adapter, side by side. Needs finetune[demo]."""
    from finetune.demo.page import gradio, page

    gr = gradio()  # before anything slow is loaded
    from finetune.demo.columns import Columns

    page(gr, Columns(adapter, base, held=held(dtype)), strengths).launch(server_name="127.0.0.1", server_port=port)


def held(dtype: str) -> ModelConfig:
    """How a base is to lie in memory."""
    from finetune.config.memory import DTYPES
    from finetune.config.schema import ModelConfig
    from finetune.errors import UserError, nearest

    if dtype not in DTYPES:
        raise UserError(f"--dtype: {dtype!r} is not known{nearest(dtype, DTYPES)}")
    return ModelConfig(dtype=dtype)


def _judge(path: Path, base: str | None) -> None:
    """Verify what was written, where its base is at hand; ends with 4 where a check fails."""
    from finetune.errors import UserError
    from finetune.export.base import absence
    from finetune.export.read import identify
    from finetune.export.verify import verify

    if why := absence(identify(path), base):
        typer.echo(f"{path}: written, not verified: {why}; name it with --base")
        return
    try:
        found = verify(path, base)
    except UserError as error:
        typer.echo(f"{path}: written, not verified: {error}")
        return
    typer.echo(str(found))
    found.require()


def _numbers(text: str | None, count: int) -> tuple[float, ...]:
    from finetune.errors import UserError

    if text is None:
        return (1.0,) * count
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--weights {text!r}: expected numbers with commas between them, such as 1,0.5") from error


def _refuse(given: dict[str, object], why: str) -> None:
    from finetune.errors import UserError

    for option, value in given.items():
        if value is not None:
            raise UserError(f"{option} {why}")
