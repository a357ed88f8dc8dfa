"""``finetune …``: every verb is a few lines that call the module which does the work, imported only then."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import finetune
from finetune import cli_adapters as adapters
from finetune import cli_data as data
from finetune import cli_tinyworld as tinyworld
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
Adapter = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="A LoRA file, a model folder or a run's folder.", show_default=False)
]
Base = Annotated[
    str | None, typer.Option(help="The base model, as model.path in a recipe.", show_default="what the file says")
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
    each_concept: Annotated[
        bool, typer.Option("--each-concept", help="One run a concept, each into a folder below the recipe's output.")
    ] = False,
) -> None:
    """Run a recipe; run it again to continue where it stopped.

    With --launch, what follows `--` goes to accelerate launch: -- --num_processes 8.
    """
    from finetune.config.command import launch_options, launch_recipe, run_each, run_recipe

    settings, options = launch_options(overrides or [], launch)
    if each_concept:
        run_each(recipe, settings, launch, options)
    elif launch is None:
        run_recipe(recipe, settings)
    else:
        launch_recipe(recipe, settings, launch, options)


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
    profiles: Annotated[bool, typer.Option(help="Say what each memory profile would need.")] = True,
    gpu_memory: Annotated[
        float | None, typer.Option(min=1, help="GiB of each GPU, for the advice how to launch; else the profile's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a recipe would do: pictures, steps, class images, memory, how to launch it. Loads no weights."""
    import dataclasses
    import json

    from rich.console import Console

    from finetune.config import read_recipe
    from finetune.config.profiles import usable

    resolved = read_recipe(recipe, overrides or [])  # before anything slow is imported
    from finetune import plan as plans

    room = None if gpu_memory is None else usable(gpu_memory)
    found = plans.plan(resolved, processes, profiles, room, " ".join([str(recipe), *(overrides or [])]))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        plans.render(found, Console())


@app.command()
def sample(
    adapter: Adapter,
    prompt: Annotated[list[str], typer.Option(help="What to draw; may be given several times.", show_default=False)],
    base: Base = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    strength: Annotated[float, typer.Option(help="How much a LoRA counts: 0 is the base, 1 what was trained.")] = 1.0,
    negative: Annotated[str, typer.Option(help="What guidance leads away from.", show_default=False)] = "",
    count: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 1,
    steps: Annotated[int, typer.Option(min=1)] = 25,
    guidance: Annotated[float, typer.Option(min=0)] = 5.0,
    guidance_rescale: Annotated[float, typer.Option(min=0, max=1, help="About 0.7 with zero terminal SNR.")] = 0.0,
    scheduler: Annotated[str | None, typer.Option(help="A class of diffusers.", show_default="the model's own")] = None,
    resolution: Annotated[int | None, typer.Option(min=8, help="Side in pixels.", show_default="the model's")] = None,
    prompt_chunks: Annotated[
        int | None, typer.Option(min=1, help="Times the text encoder's 77 tokens.", show_default="what the file says")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the base: float32, bfloat16 or float16.")] = "float32",
    out: Annotated[Path, typer.Option(help="Folder, or a .png where one picture is drawn.")] = Path("samples"),
) -> None:
    """Draw with an exported adapter, loaded by diffusers as anybody would."""
    from finetune.config.schema import SamplerConfig
    from finetune.export import sample as export_sample
    from finetune.files import replacing

    sampler = SamplerConfig(steps=steps, guidance=guidance, guidance_rescale=guidance_rescale, scheduler=scheduler)
    pictures = export_sample.sample(
        adapter,
        prompt,
        base=base,
        seed=seed,
        strength=strength,
        sampler=sampler,
        count=count,
        resolution=resolution,
        prompt_chunks=prompt_chunks,
        negative=negative,
        held=adapters.held(dtype),
    )
    for number, picture in enumerate(pictures):
        alone = len(pictures) == 1 and out.suffix == ".png"
        path = out if alone else out / f"{number // count:02d}-{number % count}.png"
        with replacing(path) as temporary:
            picture.save(temporary, format="PNG")
        typer.echo(path)


@app.command()
def verify(
    adapter: Adapter,
    base: Base = None,
    against: Annotated[
        str | None, typer.Option(help="diffusers, kohya, comfyui, a1111, with commas.", show_default="all that fit")
    ] = None,
) -> None:
    """Load an exported adapter again as other tools do, and compare. Ends with 4 where a check fails."""
    from finetune.export.verify import verify as check

    found = check(adapter, base, against.replace(" ", "").split(",") if against else None)
    typer.echo(str(found))
    found.require()


@app.command()
def inspect(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="An adapter of any trainer, or a run's folder.", show_default=False)
    ],
    as_json: AsJson = False,
) -> None:
    """Say what an adapter is: method, layout, ranks, model, trigger words, and which tools load it. Needs no model."""
    import dataclasses
    import json

    from finetune.export.inspect import inspect as look

    found = look(file)
    typer.echo(json.dumps(dataclasses.asdict(found), indent=2) if as_json else str(found))


@app.command("merge-concepts")
def merge_concepts(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Custom Diffusion runs, or their folders.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the delta and the words.", show_default=False)],
    prompt: Annotated[
        list[str] | None, typer.Option(help="What each is called, '<new1> cat', in order.", show_default="the trigger")
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(help="Prompts to leave as they are, a line each.", show_default="random words of the vocabulary"),
    ] = None,
    base: Base = None,
) -> None:
    """Put several Custom Diffusion concepts into one delta, in closed form, without training."""
    from finetune.export.merge_concepts import merge_concepts as merge
    from finetune.export.merge_concepts import read_prompts

    path = merge(runs, out, prompt, read_prompts(keep) if keep else None, base)
    typer.echo(f"{path}: draw with it: finetune sample {out} --prompt ...")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or its recipe.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Let the embedded world's judge compare a run's export with its base."""
    import dataclasses
    import json

    from finetune.judge_run import figures, judge_run

    found = judge_run(run)
    typer.echo(json.dumps(dataclasses.asdict(found), indent=2) if as_json else figures(found))


@app.command()
def tokens(
    model: Annotated[
        str, typer.Argument(help="A diffusers folder, a hub name, tinyworld or tinyworld-flow.")
    ] = "tinyworld",
    count: Annotated[int, typer.Option(min=1)] = 20,
) -> None:
    """Rare words for a new subject: one token each, hardly used, with the norm of what they mean so far."""
    from finetune.config.schema import ModelConfig
    from finetune.families import load_family
    from finetune.families.tokens import rare_tokens

    family = load_family(ModelConfig(path=model))
    for vocabulary in family.sites.vocabularies:
        family.require(vocabulary.network)
        embedding = family.networks[vocabulary.network].get_input_embeddings().weight  # type: ignore[operator]
        for found in rare_tokens(vocabulary.tokenizer, embedding, count):
            typer.echo(f"{found.word}\ttoken {found.id}\tnorm {found.norm:.3f}")


@app.command()
def models() -> None:
    """The architectures that can be trained, and by which methods."""
    from finetune.families import EMBEDDED
    from finetune.families.support import table

    typer.echo(table())
    typer.echo(f"model.path: {' and '.join(EMBEDDED)} come with the toolkit, small ones of the families sd and sd3.")
    typer.echo("Weights from elsewhere carry their own licence: read the model's card before you train or publish.")


@app.command()
def formats() -> None:
    """Which files each method writes for each architecture, and which tools read them; takes some seconds."""
    from finetune.formats import table

    typer.echo(table(), nl=False)


for verb in (
    adapters.convert,
    adapters.merge,
    adapters.extract,
    adapters.resize,
    adapters.prune,
    adapters.push,
    adapters.demo,
):
    app.command()(verb)
app.add_typer(
    data.app, name="data", help="Pictures and captions before training: what is wrong, what the model will see."
)
app.add_typer(tinyworld.app, name="tinyworld", help="The embedded world: fresh subjects, styles, captions, its model.")
