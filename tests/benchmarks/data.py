"""How fast pictures become tensors, facts and latents, and what a plan of a million pictures takes.

python tests/benchmarks/data.py                 all of it, some minutes
python tests/benchmarks/data.py pictures scan   some of it

Every ratio is of two things measured in turns in one run, the best of several turns each, so that a busy machine spoils
no comparison. What is compared with is written out here: Pillow and ``datasets``, used as their documentation does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from finetune.config.schema import BucketsConfig, ConceptConfig, DataConfig, ImagesPrior, Recipe
from finetune.data import decoding, images, sources
from finetune.data.ahead import ahead
from finetune.data.encode import Latents
from finetune.data.facts import Known
from finetune.data.framing import Framing, Size
from finetune.data.processes import Alone
from finetune.data.sources import Concept, Picture

KINDS = {  # size, suffix, EXIF orientation
    "4032 x 3024 JPEG, turned by EXIF": ((4032, 3024), ".jpg", 6),
    "3000 x 2000 JPEG": ((3000, 2000), ".jpg", 1),
    "1600 x 1200 JPEG": ((1600, 1200), ".jpg", 1),
    "1024 x 1024 PNG": ((1024, 1024), ".png", 1),
}
TURNS = 5


def main(arguments: Sequence[str] | None = None) -> None:
    """Print figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; all of them unless named")
    parser.add_argument("--scale", type=float, default=1.0, help="of the sides of pictures and the length of lists")
    parser.add_argument("--turns", type=int, default=TURNS)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    libraries = ", ".join(
        f"{name} {version(name)}" for name in ("pillow", "numpy", "torch", "datasets", "transformers")
    )
    print(
        f"{_processor()}, {os.cpu_count()} cores, {platform.system()}; Python {platform.python_version()}, {libraries}"
    )
    for name in asked.parts or PARTS:
        print(f"\n{name}")
        PARTS[name](asked.scale, asked.turns)


# pictures: decode, bucket, cut, normalise


def pictures(scale: float, turns: int) -> None:
    """Pictures of each kind per second, by Pillow and ``datasets`` and here, with 1 and 2 workers."""
    side = max(32, int(512 * scale))
    framing = Framing.of(
        DataConfig(concepts=[ConceptConfig(folder="x")], resolution=side, buckets=BucketsConfig(step=16))
    )
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            paths = photographs(Path(folder), kind, scale, 16)
            taken = [Picture(path.name, path, ("",), decoding.inspect(path)) for path in paths]
            for workers in (1, 2):
                compared = with_datasets(paths, framing.sizes, workers), with_threads(taken, framing, workers)
                theirs, ours = best(turns, *compared)
                speeds = f"{len(paths) / theirs:6.1f} -> {len(paths) / ours:6.1f} pictures/s"
                print(f"  {kind}, {workers} worker{'s' * (workers > 1)}: {speeds}, {theirs / ours:.2f} times")


def with_datasets(paths: Sequence[Path], sizes: Sequence[Size], workers: int) -> Callable[[], object]:
    """Reads all pictures by a transform of ``datasets``; several workers are the processes of a ``DataLoader``."""
    from datasets import Dataset
    from datasets import Image as ImageFeature

    ratios = np.log([size.width / size.height for size in sizes])

    def cut(rows: dict[str, list[Image.Image]]) -> dict[str, list[torch.Tensor]]:
        found = []
        for picture in rows["image"]:
            image = ImageOps.exif_transpose(picture).convert("RGB")
            target = sizes[int(np.abs(ratios - np.log(image.width / image.height)).argmin())]
            scale = max(target.width / image.width, target.height / image.height)
            scaled = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
            left, top = (scaled.width - target.width) // 2, (scaled.height - target.height) // 2
            values = np.asarray(scaled.crop((left, top, left + target.width, top + target.height)), dtype=np.float32)
            found.append(torch.from_numpy(values).permute(2, 0, 1) / 127.5 - 1)
        return {"pixels": found}

    rows: Any = Dataset.from_dict({"image": [str(path) for path in paths]}).cast_column("image", ImageFeature())
    rows.set_transform(cut)
    if workers > 1:  # they are started by the turn that does not count
        rows = torch.utils.data.DataLoader(rows, batch_size=1, num_workers=workers, persistent_workers=True)
    return lambda: [None for _ in rows]


def with_threads(taken: Sequence[Picture], framing: Framing, workers: int) -> Callable[[], object]:
    """Reads all pictures by this toolkit; several workers are threads."""

    def pixels(one: Picture) -> torch.Tensor:
        return images.pixels(one, framing.crop(one.facts.width, one.facts.height))

    def read() -> None:
        with ThreadPoolExecutor(workers) as pool:
            for _, future in ahead(pool, pixels, taken, 8):
                future.result()

    return read


# scan: what is known of files before a run


def scan(scale: float, turns: int) -> None:
    """Scanning a folder: every picture decoded, or known by its content."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "photos"
        paths = [path for kind in KINDS for path in photographs(folder, kind, scale, 30)]
        data = DataConfig(concepts=[ConceptConfig(folder=str(folder), prompt="a")])

        def cold(workers: int) -> Callable[[], object]:
            return lambda: sources.survey(data, known=Known(None), workers=workers)

        def full() -> None:
            for path in paths:
                decoding.decode(decoding.read(path), path)

        sources.survey(data, known=Known(Path(name) / "cache"))
        whole, one, two, warm = best(
            turns, full, cold(1), cold(2), lambda: sources.survey(data, known=Known(Path(name) / "cache"), workers=1)
        )
        count, size = len(paths), sum(path.stat().st_size for path in paths)
        print(f"  {count} pictures, {size / 1e6:.0f} MB; decoded whole {count / whole:.0f} pictures/s")
        for what, seconds in (("cold, 1 thread", one), ("cold, 2 threads", two), ("warm, 1 thread", warm)):
            print(f"  {what}: {count / seconds:.0f} pictures/s, {one / seconds:.1f} times")


# cache: decode, encode and write, or read


def cache(scale: float, turns: int) -> None:
    """Latents of the embedded model: made and written, or read."""
    from finetune.config.schema import ModelConfig
    from finetune.families import load_family

    family = load_family(ModelConfig())
    family.require("vae")
    with tempfile.TemporaryDirectory() as name:
        paths = photographs(Path(name) / "photos", "1600 x 1200 JPEG", scale, max(4, int(100 * scale)))
        taken = [Picture(path.name, path, ("",), decoding.inspect(path)) for path in paths]
        folders = iter(range(10**6))

        def latents(number: int) -> None:
            data = DataConfig(
                concepts=[ConceptConfig(folder="x")], resolution=64, cache={"folder": str(Path(name) / str(number))}
            )
            framing, found = Framing.of(data), Latents(family, data)
            cuts = [(one, framing.crop(one.facts.width, one.facts.height), False) for one in taken]
            found.fill(cuts, Alone())
            for cut in cuts:
                found.get(*cut)

        latents(-1)
        cold, warm = best(min(turns, 3), lambda: latents(next(folders)), lambda: latents(-1))
        print(f"  cold {len(paths) / cold:.0f}, warm {len(paths) / warm:.0f} pictures/s, {cold / warm:.1f} times")


# plan: a list of a million


def plan(scale: float, turns: int) -> None:
    """Seconds and memory of a plan, in a process of its own."""
    count = str(int(1_000_000 * scale))
    done = subprocess.run([sys.executable, __file__, "--of", count], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"  {count} pictures: planned in {found['plan']:.1f} s of processor time")
    print(f"  all draws of the first epoch in {found['order']:.1f} s")
    print(f"  at most {found['memory'] / 1e9:.2f} GB, of which {found['pictures'] / 1e9:.2f} GB with the list alone")


def plan_of(count: int) -> None:
    """Plan a list that is made up: sizes of all kinds, captions of 8 to 32 of 20,000 words, each its own."""
    from finetune.data.batches import Batches
    from finetune.data.encode import Prompts
    from finetune.data.prior import foreseen
    from finetune.families import load_family
    from finetune.plan import build

    recipe = Recipe.model_validate(
        {
            "recipe": "dreambooth",
            "output": "run",
            "adapter": {"kind": "lora"},
            "data": {
                "resolution": 64,
                "buckets": {"step": 16},
                "concepts": [{"folder": "photos", "prompt": "a zib star", "class_prompt": "a star", "trigger": "zib"}],
                "cache": {"folder": "there-is-no-such-folder"},
            },
            "prior": {"kind": "images"},
            "train": {"batch_size": 4},
        }
    )
    concepts = [Concept(recipe.data.concepts[0], tuple(map(_made_up, range(count))))]
    found: dict[str, float] = {"pictures": _peak()}
    sources.scan = lambda *_, **__: concepts  # type: ignore[assignment]
    start = time.process_time()
    build.plan(recipe)
    found["plan"] = time.process_time() - start
    family = load_family(recipe.model)
    prior = recipe.prior
    assert isinstance(prior, ImagesPrior)
    start = time.process_time()
    batches = Batches(
        recipe, family, concepts, foreseen(recipe, concepts), Latents(family, recipe.data), Prompts(family, recipe.data)
    )
    drawn = {one.item for number in range(count) for one in batches.order.at(number) if not one.prior}
    assert len(drawn) == count
    found["order"] = time.process_time() - start
    print(json.dumps(found | {"memory": _peak()}))


def _made_up(number: int) -> Picture:
    digest = hashlib.sha256(number.to_bytes(8, "big")).digest()
    words = range(8 + digest[0] % 25)
    text = "a photo of zib " + " ".join(_word(number * 7919 + place * 104729) for place in words)
    facts = decoding.Facts(digest.hex(), 200_000 + digest[1], 512 + 2 * digest[2], 512 + 3 * digest[3], False, 1)
    return Picture(f"0/{number:07}.jpg", Path(f"photos/{number:07}.jpg"), (text,), facts)


def _word(number: int) -> str:
    number = number * 48271 % 20_011
    return "".join(chr(97 + number // 26**place % 26) for place in range(4))


def _peak() -> float:
    """Most memory that this process had, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def best(turns: int, *calls: Callable[[], object]) -> list[float]:
    """The shortest time of each call, seconds; they take turns, and the first turn does not count."""
    times: list[list[float]] = []
    for _ in range(turns + 1):
        row = []
        for call in calls:
            start = time.perf_counter()
            call()
            row.append(time.perf_counter() - start)
        times.append(row)
    return [min(column) for column in zip(*times[1:], strict=True)]


def photographs(folder: Path, kind: str, scale: float, count: int) -> list[Path]:
    """Noise of all sizes with grain: as smooth, as rough and in files as large as photographs."""
    (width, height), suffix, orientation = KINDS[kind]
    size = (max(64, int(width * scale) // 8 * 8), max(64, int(height * scale) // 8 * 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    paths = [folder / f"{width}-{number}{suffix}" for number in range(count)]
    folder.mkdir(exist_ok=True)
    content = b""
    for number, path in enumerate(paths):
        if number < 2 or suffix == ".png":  # drawing them takes longer than all else: two are enough of each kind
            rng = np.random.default_rng([number, width])
            values = sum(_layer(rng, side, size) for side in (2, 4, 8, 16, 32, 64, 128, 256)) / 4 + rng.normal(
                0, 5, (*size[::-1], 3)
            )
            Image.fromarray((values + 128).clip(0, 255).astype(np.uint8)).save(path, quality=92, exif=exif)
            content = path.read_bytes()
        else:
            path.write_bytes(content + number.to_bytes(2, "big"))  # another file with the same picture
    return paths


def _layer(rng: np.random.Generator, side: int, size: tuple[int, int]) -> Any:
    coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
    return (np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float32) - 128) * 4 / side**0.5


PARTS: dict[str, Callable[[float, int], None]] = {"pictures": pictures, "scan": scan, "cache": cache, "plan": plan}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--of"]:
        plan_of(int(sys.argv[2]))
    else:
        main()
