"""Rebuild the shipped base and judge from nothing: pictures, autoencoder, small CLIP, judge, latents, denoiser, export.

Every stage is deterministic on one machine, writes its result to the work folder and is passed over when that exists;
an interrupted stage goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

SEED = 0
LIMIT = 16_000_000
HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Budget:
    """Steps of each stage; the defaults are those of the shipped files. ``workers`` are single-threaded processes."""

    vae: int = 4000
    clip: int = 900
    clip_sharp: int = 500
    clip_fill: int = 400
    judge: int = 2000
    unet_start: int = 2250
    unet_middle: int = 1500
    unet_late: int = 2000
    unet: int = 2750
    workers: int = 2

    @property
    def denoiser(self) -> tuple[int, int, int]:
        """Steps of the denoiser's stages after the first."""
        return self.unet_middle, self.unet_late, self.unet

    def scaled(self, scale: float) -> Budget:
        """Every stage ``scale`` times as long."""
        steps = {name: max(1, round(count * scale)) for name, count in asdict(self).items() if name != "workers"}
        return Budget(**steps, workers=self.workers)


def stages(work: Path, budget: Budget) -> dict[str, Callable[[], None]]:
    """What there is to do, in order.

    The text tower is trained in three stages, because the first two did not tell fills apart well enough; the denoiser
    goes along, each of its stages with the newest tower. That is how the shipped files came about.
    """
    from finetune.tinyworld.training import clip, data, judge, latents, unet, vae
    from finetune.tinyworld.training.fit import in_workers

    many = budget.workers

    def pictures() -> None:
        data.training_scenes(work / "data")
        data.training_individuals(work / "data")

    def stage(name: str, run: Callable[..., None], workers: int, *arguments: object) -> Callable[[], None]:
        return lambda: in_workers(run, workers, work / name, *arguments)

    listed = {
        "data": pictures,
        "vae": stage("vae", vae.train, many, budget.vae, 32, SEED),
        "judge": stage("judge", judge.train, 1, budget.judge, 128, SEED),
        "latents": lambda: latents.encode(work / "latents", work / "vae" / "model"),
        "clip": stage("clip", clip.train, 1, budget.clip, 96, SEED),
        "clip-sharp": stage("clip-sharp", clip.train, many, budget.clip_sharp, 96, SEED + 1, "clip"),
        "clip-fill": stage("clip-fill", clip.train, many, budget.clip_fill, 96, SEED + 2, "clip-sharp", True),
        "unet-start": stage("unet-start", unet.train, many, budget.unet_start, 32, SEED, "clip", "", 1.0),
    }
    middle, late, last = ((steps, 32, SEED + n) for n, steps in enumerate(budget.denoiser, 1))
    listed["unet-middle"] = stage("unet-middle", unet.train, many, *middle, "clip-sharp", "unet-start", 1.0)
    listed["unet-late"] = stage("unet-late", unet.train, many, *late, "clip-fill", "unet-middle", 0.5)
    listed["unet"] = stage("unet", unet.train, many, *last, "clip-fill", "unet-late", 0.6364)
    return listed


def build(work: Path, out: Path, budget: Budget, say: Callable[[str], None] = print) -> dict[str, float]:
    """Train what is not trained yet in ``work`` and write ``out/base``, ``out/clip`` and ``out/judge``.

    Returns:
        Minutes that each stage took, over all interrupted runs (``work/minutes.json`` keeps them).
    """
    from finetune.tinyworld.training import card

    minutes = run(stages(work, budget), work, say)
    export(work, out)
    steps = ", ".join(f"{name} {count}" for name, count in asdict(budget).items())
    card.write(out, card.BASE, ("base", "clip", "judge"), seed=SEED, steps=steps, machine=machine(), minutes=minutes)
    return minutes


def run(listed: Mapping[str, Callable[[], None]], work: Path, say: Callable[[str], None] = print) -> dict[str, float]:
    """Do what of the stages is not done yet, and say how many minutes each of them took, over all interrupted runs."""
    record = work / "minutes.json"
    work.mkdir(parents=True, exist_ok=True)
    minutes: dict[str, float] = json.loads(record.read_text()) if record.exists() else {}
    for name, stage in listed.items():
        if any((work / name / made).exists() for made in ("model", "latents.safetensors", "prompts.safetensors")):
            say(f"{name}: there already")
            continue
        begun = time.monotonic()
        stage()
        minutes[name] = round(minutes.get(name, 0) + (time.monotonic() - begun) / 60, 1)
        record.write_text(json.dumps(minutes, indent=1) + "\n")
        say(f"{name}: {minutes[name]} minutes")
    return {name: minutes[name] for name in listed if name in minutes}


def export(work: Path, out: Path) -> int:
    """Write the folders that are shipped, and return their size in bytes.

    Raises:
        GuardError: when they are larger than ``LIMIT`` together.
    """
    from finetune.tinyworld.training import export as writing

    writing.save(writing.pipeline(work), out / "base")
    writing.save_towers(work / writing.CLIP / "model", out / "clip")
    (out / "judge").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(work / "judge" / "model" / "judge.safetensors", out / "judge" / "judge.safetensors")
    (out / "judge" / "judge.safetensors").chmod(0o644)
    return checked_size(out)


def checked_size(out: Path) -> int:
    """Bytes of everything shipped.

    Raises:
        GuardError: when they are ``LIMIT`` or more.
    """
    from finetune.errors import GuardError

    size = shipped_bytes(out)
    if size >= LIMIT:
        raise GuardError(f"{out}: the shipped files hold {size:,} bytes together; expected less than {LIMIT:,}")
    return size


def shipped_bytes(out: Path = HERE) -> int:
    """Bytes of everything shipped."""
    folders = (out / name for name in ("base", "base-flow", "clip", "judge"))
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def machine() -> str:
    """Where this runs, in a line: processor, system and library versions."""
    import diffusers
    import torch
    import transformers

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}"
    return f"{model}, Python {platform.python_version()}, {versions}"
