"""``finetune data masks``: choose a way, make this process's share of the masks, say what came of it."""

from __future__ import annotations

from pathlib import Path

from rich.progress import track

from data_tools import tiles
from data_tools.masking import preview
from data_tools.masking.choice import Asked, choose
from data_tools.masking.folder import Made, check_folder, make, pictures
from data_tools.masking.shape import Shape
from finetune.distributed import start


def run(
    source: Path, out: Path, asked: Asked, shape: Shape, overwrite: bool = False, sheet: Path | None = None
) -> bool:
    """Make masks of a folder's pictures; processes take every so many-th picture each.

    Args:
        sheet: where to show them all, those that were there too.

    Returns:
        whether every picture has a mask as it was asked for.

    Raises:
        UserError: nothing can be made at all.
    """
    found = pictures(source)
    check_folder(found, out)
    if sheet:
        tiles.check(sheet)
    processes = start()
    way = choose(asked, found, shape.cut, processes.device)
    share = found[processes.rank :: processes.world]
    results = make(share, out, way, shape, overwrite)
    shown = track(results, "Making masks", total=len(share), transient=True, disable=not processes.is_main)
    parts = processes.gather_object(list(shown))
    together = [one for part in parts for one in part]
    made = sorted((one for one in together if isinstance(one, Made)), key=lambda one: one.picture)
    problems = sorted(one for one in together if isinstance(one, str))
    for one in made:
        processes.say(f"{one.mask}: {100 * one.share:.1f} % of {one.picture.name}" + ("" if one.new else ", was there"))
    for problem in problems:
        processes.say(f"no mask: {problem}")
    if sheet:
        processes.on_main(lambda: preview.write(sheet, made, f"Masks of {source}"), "drawing the sheet")
    new = sum(one.new for one in made)
    processes.say(f"{new} masks made, {len(made) - new} were there, {len(problems)} pictures without one: {out}")
    return not problems
