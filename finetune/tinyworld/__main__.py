"""``python -m finetune.tinyworld …``: the same commands without the rest of the toolkit's command line."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from finetune.errors import UserError
from finetune.tinyworld import NAMES, commands, document


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m finetune.tinyworld", description="The embedded world.")
    verbs = top.add_subparsers(dest="verb", required=True)
    for verb in ("subject", "style"):
        drawn = verbs.add_parser(verb, help=f"draw a never-seen {verb}")
        drawn.add_argument("--seed", type=int, required=True)
        drawn.add_argument("--out", type=Path, required=True)
    captions = verbs.add_parser("captions", help="captions that the base never saw, with the factors they name")
    captions.add_argument("--count", type=int, default=20)
    captions.add_argument("--out", type=Path)
    sheet = verbs.add_parser("sheet", help="a sheet of the base's pictures")
    sheet.add_argument("prompts", nargs="*")
    sheet.add_argument("--out", type=Path, required=True)
    sheet.add_argument("--seed", type=int, default=0)
    sheet.add_argument("--model", choices=NAMES, default=NAMES[0])
    gates = verbs.add_parser("gates", help="check the judge and the base")
    gates.add_argument("--count", type=int, default=200)
    gates.add_argument("--model", choices=NAMES, default=NAMES[0])
    filled = verbs.add_parser("document", help="fill docs/tinyworld.md: pictures and tables")
    filled.add_argument("--docs", type=Path, default=Path("docs"))
    for verb, trained in (("build-base", "the base and the judge"), ("build-flow", "the flow-matching base")):
        build = verbs.add_parser(verb, help=f"train {trained} again")
        build.add_argument("--work", type=Path, required=True, help="pictures, latents and checkpoints; resumes")
        build.add_argument("--out", type=Path, help="default: the package's own folders")
        build.add_argument("--scale", type=float, default=1.0, help="steps of every stage, 1 = as shipped")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    given = parser().parse_args(arguments)
    try:
        return _run(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(given: argparse.Namespace) -> int:
    if given.verb in ("subject", "style"):
        write = commands.write_subject if given.verb == "subject" else commands.write_style
        print(f"{len(write(given.seed, given.out))} files in {given.out}")
    elif given.verb == "captions":
        for line in commands.write_captions(given.count, given.out):
            print(json.dumps(line))
    elif given.verb == "sheet":
        print(commands.write_samples(given.out, given.prompts or None, seed=given.seed, model=given.model))
    elif given.verb == "gates":
        gates, accuracy = commands.check_gates(given.model, given.count)
        for gate in gates:
            print(f"{'ok  ' if gate.passed else 'FAIL'} {gate.name}: {gate.value:.3f} (limit {gate.limit})")
        print(", ".join(f"{name} {value:.3f}" for name, value in accuracy.items()))
        return 0 if all(gate.passed for gate in gates) else 4
    elif given.verb == "document":
        document.write(given.docs)
    else:
        build = commands.build_base if given.verb == "build-base" else commands.build_flow
        build(given.work, given.out, scale=given.scale)
    return 0


if __name__ == "__main__":
    sys.exit(main())
