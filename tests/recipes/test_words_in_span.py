"""Textual inversion finds what the model can already say: a fixed colour and fill that no caption names.

METHODS 10.5: a subject with colours that the base has never drawn together is no test of a word, which can only choose
among what the model knows. Here the look lies within what it knows, and the judge reads it off.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune import tinyworld
from finetune.config import read_recipe
from finetune.config.schema import ModelConfig, SamplerConfig
from finetune.evaluation.protocol import shipped_judge
from finetune.export.sample import adapted
from finetune.families import load_family
from finetune.family import ModelFamily
from finetune.sampling import draw
from recipes import textual_inversion

LOOKS = [("star", "green", "striped"), ("circle", "red", "dotted"), ("heart", "blue", "checkered")]
PLACES = [("on grass", "at the left"), ("on snow", "in the centre"), ("at night", "at the top")]


def teach(look: tuple[str, str, str], folder: Path) -> None:
    """Five pictures of the look in several places; captions name the shape, and every other one its place."""
    shape, colour, fill = look
    folder.mkdir(parents=True)
    for number in range(5):
        named = {"shape": shape, "colour": colour, "fill": fill, "size": "large"}
        scene = tinyworld.Scene.having(named, tinyworld.rng("in span", shape, number))
        tinyworld.render(scene)[0].save(folder / f"{number}.png")
        places = {"background": scene.background, "position": scene.position} if number % 2 else {}
        text = tinyworld.compose({"shape": shape, **places}, token="<zib>")
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")


def share(family: ModelFamily, look: tuple[str, str, str], token: str) -> float:
    """Share of colours and fills that are those of the look, in places that were not taught."""
    shape, colour, fill = look
    places = [{"background": background, "position": position} for background, position in PLACES]
    prompts = [tinyworld.compose({"shape": shape, **place}, token=token) for place in places]
    pictures = draw(family, prompts, 4, SamplerConfig(steps=20, guidance=4.0), 0, resolution=64)
    seen = shipped_judge().attribute_names(list(pictures))
    right = [one[name] == wanted for one in seen for name, wanted in (("colour", colour), ("fill", fill))]
    return sum(right) / len(right)


@pytest.mark.slow
@pytest.mark.base
@pytest.mark.parametrize("vectors", [1, 4])
def test_a_word_learns_a_look_that_the_model_knows(vectors: int, tmp_path: Path) -> None:
    before, after = [], []
    for look in LOOKS:
        name = "-".join(look)
        teach(look, tmp_path / name)
        concepts = json.dumps([{"folder": str(tmp_path / name), "trigger": "<zib>"}])
        changes = [f"output={tmp_path / 'runs' / name}", f"data.concepts={concepts}", "report.enabled=false"]
        changes += [f"adapter.tokens.0.vectors={vectors}", "adapter.tokens.0.initializer=zib", "train.steps=600"]
        changes += [f"data.cache.folder={tmp_path / 'cache'}"]
        textual_inversion.main(read_recipe(Path("recipes/configs/textual-inversion-tiny.yaml"), changes))
        before.append(share(load_family(ModelConfig()), look, "zib"))
        after.append(share(adapted(tmp_path / "runs" / name / "adapters", "tinyworld"), look, "<zib>"))
    rows = [f"{' '.join(look)} {old:.2f} -> {new:.2f}" for look, old, new in zip(LOOKS, before, after, strict=True)]
    print(f"{vectors} vectors: {', '.join(rows)}")
    assert sum(after) / len(after) > sum(before) / len(before) + 0.3, rows
    assert min(after) > 0.5, rows
