"""What ``finetune tinyworld …`` does: plain functions that write files and return what they wrote.

No function but ``build_base``, ``build_flow``, ``write_samples`` and ``check_gates`` loads torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.tinyworld import NAMES, pipeline, world
from finetune.tinyworld.style import heldout_scenes, style, training_scenes
from finetune.tinyworld.subject import HELDOUT, Subject, instance_scenes, new_scenes, prompt_of, scene_prompts, subject
from finetune.tinyworld.world import Scene

if TYPE_CHECKING:
    from finetune.tinyworld.gates import Gate


def write_subject(seed: int, out: Path, token: str | None = None) -> list[Path]:
    """Draw a never-seen subject; ``token`` replaces its rare word in all captions.

    ``instance/00.png … 04.png`` with ``metadata.jsonl``, ``masks/`` of the same names (255 = object), ``heldout/`` with
    ``metadata.jsonl`` and ``masks/``, and ``subject.json``: seed, class word, rare token, prompts.

    An instance picture has two captions, of which a draw takes one: the bare instance prompt, and the same with the
    place and background. With the bare one alone a model takes the five backgrounds for a part of the subject; with the
    other alone it takes the words for a place as a sign of it.

    Raises:
        UserError: for a negative seed, or when ``out`` holds something else already.
    """
    one = subject(seed) if token is None else replace(subject(seed), token=token)
    _claim(out, "subject.json", seed)
    written: list[Path] = []
    lines: list[dict[str, Any]] = []
    for at, scene in enumerate(instance_scenes(one)):
        picture, mask = one.render(scene)
        written += [_save(picture, out / "instance" / f"{at:02d}.png"), _save(mask, out / "masks" / f"{at:02d}.png")]
        lines.append({"file_name": f"{at:02d}.png", "text": [one.instance_prompt, prompt_of(one, scene)[0]]})
    written.append(_write_lines(out / "instance" / "metadata.jsonl", lines))
    lines = []
    for at, scene in enumerate(new_scenes(one, HELDOUT)):
        picture, mask = one.render(scene)
        written.append(_save(picture, out / "heldout" / f"{at:02d}.png"))
        written.append(_save(mask, out / "heldout" / "masks" / f"{at:02d}.png"))
        text_of, named = prompt_of(one, scene)
        lines.append({"file_name": f"{at:02d}.png", "text": text_of, "factors": named})
    written.append(_write_lines(out / "heldout" / "metadata.jsonl", lines))
    written.append(_write_json(out / "subject.json", describe(one)))
    return written


def describe(one: Subject) -> dict[str, Any]:
    """What ``subject.json`` says."""
    return {
        "kind": "subject",
        "seed": one.seed,
        "class": one.shape,
        "token": one.token,
        "instance_prompt": one.instance_prompt,
        "class_prompt": one.class_prompt,
        "scene_prompts": [{"prompt": text, "factors": named} for text, named in scene_prompts(one)],
    }


def write_style(seed: int, out: Path, token: str | None = None) -> list[Path]:
    """Draw a style set: ``instance/`` with sidecar captions, ``heldout/`` with ``metadata.jsonl``, ``style.json``.

    ``token`` replaces its rare word in all captions.

    Raises:
        UserError: for a negative seed, or when ``out`` holds something else already.
    """
    one = style(seed) if token is None else replace(style(seed), token=token)
    _claim(out, "style.json", seed)
    written, lines = [], []
    for at, scene in enumerate(training_scenes(seed)):
        text = out / "instance" / f"{at:02d}.txt"
        written.append(_save(one.apply(world.render(scene)[0]), text.with_suffix(".png")))
        text.write_text(one.prompt(scene) + "\n", encoding="utf-8")
        written.append(text)
    for at, scene in enumerate(heldout_scenes(seed)):
        written.append(_save(one.apply(world.render(scene)[0]), out / "heldout" / f"{at:02d}.png"))
        lines.append({"file_name": f"{at:02d}.png", "text": one.prompt(scene), "factors": scene.factors})
    written.append(_write_lines(out / "heldout" / "metadata.jsonl", lines))
    facts = {"kind": "style", "seed": seed, "token": one.token, "instance_prompt": f"in the style of {one.token}"}
    written.append(_write_json(out / "style.json", facts))
    return written


def write_captions(count: int, out: Path | None = None, seed: int | None = None) -> list[dict[str, Any]]:
    """Captions that the base never saw, each with the factors it names; to ``out`` (JSON lines) where one is given.

    Raises:
        UserError: for a count below 1.
    """
    from finetune.tinyworld.unseen import UNSEEN, unseen_captions

    if count < 1:
        raise UserError(f"count is {count}; expected 1 or more captions")
    some = unseen_captions(count, UNSEEN if seed is None else seed)
    lines: list[dict[str, Any]] = [{"text": text, "factors": named} for text, named, _ in some]
    if out is not None:
        _write_lines(out, lines)
    return lines


def write_world_sheet(out: Path, count: int = 48, seed: int = 7) -> Path:
    """A sheet of scenes as the renderer draws them."""
    from finetune.tinyworld.sheets import sheet

    return _save(sheet([world.render(Scene.draw(seed, at))[0] for at in range(count)], columns=12), out)


def write_subject_sheet(out: Path, seeds: list[int]) -> Path:
    """A row for each subject: its five instance pictures and three held-out ones."""
    from finetune.tinyworld.sheets import sheet

    cast = [subject(seed) for seed in seeds]
    scenes = [(one, scene) for one in cast for scene in [*instance_scenes(one), *new_scenes(one, 3)]]
    return _save(sheet([one.render(scene)[0] for one, scene in scenes]), out)


def write_style_sheet(out: Path, seeds: list[int]) -> Path:
    """A row for each style, all of them on the same eight scenes."""
    from finetune.tinyworld.sheets import sheet

    scenes = [Scene.draw(11, at) for at in range(8)]
    return _save(sheet([style(seed).apply(world.render(scene)[0]) for seed in seeds for scene in scenes]), out)


def write_samples(
    out: Path, prompts: list[str] | None = None, *, count: int = 48, model: str = NAMES[0], seed: int = 0
) -> Path:
    """A sheet of a base's pictures, for ``prompts`` or for ``count`` unseen captions (written beside it as .txt)."""
    from finetune.tinyworld.sheets import from_floats, sheet
    from finetune.tinyworld.training.export import sample

    texts = prompts or [str(line["text"]) for line in write_captions(count)]
    pictures = sample(pipeline(model), texts, seed=seed)
    _save(sheet(from_floats(pictures.numpy()), columns=12 if len(texts) > 24 else 8), out)
    out.with_suffix(".txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return out


def check_gates(model: str = NAMES[0], count: int = 200) -> tuple[list[Gate], dict[str, float]]:
    """The judge's validity gates and a shipped base's prompt accuracy over ``count`` unseen captions, by factor."""
    from finetune.tinyworld import gates
    from finetune.tinyworld.judge import Judge

    judge, drawing = Judge.load(), pipeline(model)
    accuracy = dict(gates.base_accuracy(drawing, judge, count))
    of_base = gates.base_gates(drawing, judge, accuracy, gates.LEAST[model])
    return [*gates.judge_gates(judge, drawing.vae), *of_base], accuracy


def build_base(work: Path, out: Path | None = None, *, scale: float = 1.0, say: Callable[[str], None] = print) -> None:
    """Train the base and the judge again, into ``out`` (the package's own folders by default).

    Args:
        work: where pictures, latents and checkpoints go; call again to resume.
        scale: multiplies the steps of every stage, 1 = as shipped.

    Raises:
        UserError: for a scale that isn't positive.
        GuardError: when the files are larger than the limit.
    """
    from finetune.tinyworld import build

    build.build(work, out or build.HERE, build.Budget().scaled(_positive(scale)), say)


def build_flow(work: Path, out: Path | None = None, *, scale: float = 1.0, say: Callable[[str], None] = print) -> None:
    """Train the flow-matching base again, on the shipped autoencoder and text encoder; otherwise as ``build_base``."""
    from finetune.tinyworld import build, build_flow

    steps = max(1, round(build_flow.STEPS * _positive(scale)))
    build_flow.build(work, out or build.HERE, steps, say)


def _positive(scale: float) -> float:
    if scale <= 0:
        raise UserError(f"scale is {scale}; expected a positive number, 1 = as shipped")
    return scale


def _claim(out: Path, name: str, seed: int) -> None:
    """Refuse a folder that holds anything but the same set."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file; expected a folder to write to")
    said = out / name
    if said.exists() and json.loads(said.read_text(encoding="utf-8")).get("seed") == seed:
        return
    if any(out.iterdir()):
        raise UserError(f"{out} holds other files already; expected an empty folder or a new one")


def _save(picture: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


def _write_json(path: Path, facts: dict[str, Any]) -> Path:
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return path


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
