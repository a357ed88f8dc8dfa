from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.errors import UserError
from finetune.tinyworld import commands, draw, instance_scenes, new_scenes, parse, scene_prompts, style, subject, world
from finetune.tinyworld.subject import training_subject
from finetune.tinyworld.world import Scene


def test_a_subject_is_a_function_of_its_seed() -> None:
    assert subject(18) == subject(18)
    assert len({subject(seed).first for seed in range(40)}) == 40


def test_subjects_for_training_are_others() -> None:
    mine = {(s.first, s.second, s.angle) for s in map(subject, range(200))}
    assert not mine & {(s.first, s.second, s.angle) for s in (training_subject(2, index) for index in range(200))}


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(UserError, match="negative"):
        subject(-1)
    with pytest.raises(UserError, match="negative"):
        style(-1)


@pytest.mark.parametrize("seed", range(12))
def test_mask_is_exactly_where_the_subject_stands(seed: int) -> None:
    one = subject(seed)
    scene = instance_scenes(one)[0]
    picture, mask = one.render_arrays(scene)
    empty = draw.to_bytes(np.array(world.background(scene.background, scene.light)))
    assert (picture[mask == 0] == empty[mask == 0]).all()
    assert (mask == 255).sum() > 60


def test_a_subject_looks_the_same_before_every_background() -> None:
    one = subject(3)
    scene = instance_scenes(one)[0]
    first, mask = one.render_arrays(scene)
    second, _ = one.render_arrays(scene.on("at night"))
    assert (first[mask == 255] == second[mask == 255]).all()
    assert len(np.unique(first[mask == 255], axis=0)) >= 4  # two tones, outline and dot


def test_instance_pictures_show_five_places_and_new_scenes_show_others() -> None:
    for seed in range(20):
        one = subject(seed)
        shown = [(scene.background, scene.position) for scene in instance_scenes(one)]
        assert len({b for b, _ in shown}) == len({p for _, p in shown}) == 5
        fresh = [(scene.background, scene.position) for scene in new_scenes(one, 10)]
        assert len(set(fresh)) == 10
        assert not set(fresh) & set(shown)
        assert len({b for b, _ in fresh}) == 6


def test_scene_prompts_name_what_their_factors_say() -> None:
    one = subject(5)
    for text, factors in scene_prompts(one, "zib"):
        assert f"zib {one.shape}" in text
        assert parse(text) == factors
        assert set(factors) == {"shape", "background", "position"}
    assert all("zib" not in text for text, _ in scene_prompts(one, ""))


def test_a_style_changes_everything_and_is_drawn_in_lines() -> None:
    picture, _ = world.render(Scene.draw(0, 0))
    one, other = style(1), style(2)
    assert one.apply(picture).tobytes() == style(1).apply(picture).tobytes() != other.apply(picture).tobytes()
    plain = Image.new("RGB", (64, 64), (200, 60, 60))
    drawn = np.asarray(one.apply(plain)).astype(int)
    lines = drawn[0] if one.upright else drawn[:, 0]
    assert len(np.unique(lines, axis=0)) == 2


def test_write_subject_writes_pictures_captions_masks_and_facts(tmp_path: Path) -> None:
    import json

    out = tmp_path / "subject"
    written = commands.write_subject(7, out)
    assert all(path.exists() for path in written)
    facts = json.loads((out / "subject.json").read_text())
    assert facts["seed"] == 7
    assert facts["instance_prompt"].split()[-2:] == [facts["token"], facts["class"]]
    names = sorted(path.name for path in (out / "instance").glob("*.png"))
    assert names == [f"{at:02d}.png" for at in range(5)] == sorted(path.name for path in (out / "masks").iterdir())
    taught = [json.loads(line) for line in (out / "instance" / "metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in taught] == names
    for line in taught:
        bare, placed = line["text"]
        assert bare == facts["instance_prompt"]
        assert placed.startswith(bare + " ")
    lines = [json.loads(line) for line in (out / "heldout" / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert all((out / "heldout" / line["file_name"]).exists() for line in lines)


def test_writing_again_gives_the_same_bytes_and_another_seed_is_refused(tmp_path: Path) -> None:
    written = commands.write_subject(7, tmp_path / "s")
    before = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in commands.write_subject(7, tmp_path / "s")] == before
    with pytest.raises(UserError, match="holds other files"):
        commands.write_subject(8, tmp_path / "s")


def test_write_style_and_captions(tmp_path: Path) -> None:
    written = commands.write_style(2, tmp_path / "style")
    assert all(path.exists() for path in written)
    assert "in the style of" in (tmp_path / "style" / "instance" / "00.txt").read_text()
    lines = commands.write_captions(5, tmp_path / "captions.jsonl")
    assert [parse(line["text"]) for line in lines] == [line["factors"] for line in lines]
    with pytest.raises(UserError, match="expected 1 or more"):
        commands.write_captions(0)
