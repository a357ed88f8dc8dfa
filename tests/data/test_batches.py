"""Batches pair every picture with its caption, mask and weight, and are the same cached, shared out or resumed."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from finetune.batch import Batch
from finetune.config.schema import Recipe
from finetune.data import Batches, prepare
from finetune.denoise import denoising_error
from finetune.errors import GuardError, UserError
from finetune.family import ModelFamily
from finetune.randomness import generator

Make = Callable[..., Recipe]
Folder = Callable[..., Path]
PRIOR: dict[str, Any] = {"kind": "images", "count": 6, "batch_size": 3, "sampler": {"steps": 1}}
NOT_CACHED: dict[str, Any] = {"cache": {"latents": False, "text": False}}


@dataclass(frozen=True)
class Rank:
    rank: int
    world: int

    def barrier(self) -> None:
        pass


def steps(batches: Batches, first: int, count: int) -> list[list[Batch]]:
    """The batches of ``count`` optimizer steps, grouped by step."""
    parts = batches.share.accumulation
    taken = list(itertools.islice(batches.from_step(first), count * parts))
    return [taken[parts * step : parts * step + parts] for step in range(count)]


def equal(first: Batch, second: Batch) -> bool:
    """Whether two batches are the same, bit for bit."""

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, Tensor):
            return torch.equal(one, other)
        if hasattr(one, "__dataclass_fields__"):
            return all(same(getattr(one, name), getattr(other, name)) for name in one.__dataclass_fields__)
        return bool(one == other)

    return same(first, second)


def colour(batch: Batch, row: int) -> int:
    """The index that a picture of ``folder`` tells by its red, read from its latent."""
    return round((float(batch.posterior.mean[row, 0].mean()) + 1) * 127.5 / 20)


@pytest.mark.parametrize("data", [{}, NOT_CACHED], ids=["cached", "not cached"])
@pytest.mark.parametrize("flip", [False, True])
def test_a_hundred_batches_pair_pictures_and_captions(
    data: dict[str, Any], flip: bool, make_recipe: Make, folder: Folder, fake: Any
) -> None:
    recipe = make_recipe(folder(7), data=data | {"flip": flip}, train={"batch_size": 3}, prior=PRIOR)
    family = fake()
    for batch in itertools.islice(prepare(recipe, family), 100):
        for row in range(3):
            index = colour(batch, row)
            assert batch.ids[row] == f"0/{index}.png"
            assert batch.captions[row] == f"a photo of zib number {index}"
        assert batch.captions[3:] == ("a star",) * 3
        assert batch.prior.tolist() == [False] * 3 + [True] * 3
        for row, caption in enumerate(batch.captions):
            expected = torch.randn(4, 3, generator=generator(0, caption))
            assert batch.prompt is not None
            assert torch.equal(batch.prompt.tokens[row], expected)


def test_cached_and_uncached_batches_are_equal_bit_for_bit(
    make_recipe: Make, folder: Folder, fake: Any, tmp_path: Path
) -> None:
    photos = folder(5)
    settings = {"flip": True, "caption_dropout": 0.3}
    batches = [
        prepare(make_recipe(photos, data=settings | more, train={"batch_size": 2}, prior=PRIOR), fake())
        for more in ({}, {}, NOT_CACHED, {"cache": {"latents": False}}, {"cache": {"text": False}})
    ]
    assert batches[0].describe()["latents_made"] > 0
    assert batches[1].describe()["latents_made"] == 0
    for rows in zip(*(itertools.islice(one, 20) for one in batches), strict=True):
        assert all(equal(rows[0], row) for row in rows[1:])


@pytest.mark.parametrize("text", [True, False])
def test_losses_of_a_real_model_are_equal_cached_and_not(
    text: bool, make_recipe: Make, folder: Folder, tiny_family: ModelFamily
) -> None:
    photos, losses = folder(3), []
    for cache in ({}, {"latents": False, "text": text}):
        recipe = make_recipe(photos, data={"flip": True, "cache": cache}, train={"batch_size": 2})
        batches = prepare(recipe, tiny_family)
        with torch.no_grad():
            losses.append([denoising_error(tiny_family, batch, 0) for batch in itertools.islice(batches, 20)])
        tiny_family.release("denoiser", "vae", "text_encoder")
    assert all(torch.equal(cached, other) for cached, other in zip(*losses, strict=True))


def test_phases_keep_no_more_in_memory_than_they_need(make_recipe: Make, folder: Folder, fake: Any) -> None:
    family = fake()
    prepare(make_recipe(folder(3)), family)
    assert family.together == {frozenset({"text_encoder"}), frozenset({"vae"}), frozenset({"denoiser"})}
    assert set(family.networks) == {"denoiser"}
    warm = fake()
    prepare(make_recipe(family_folder(family, folder)), warm)
    assert warm.together == {frozenset({"denoiser"})}  # all was read, so no encoder was loaded
    assert (warm.pictures, warm.captions) == (0, [])


def family_folder(_: Any, folder: Folder) -> Path:
    """The same pictures again, in another place: content decides, not where it lies."""
    return folder(3, "elsewhere")


def test_a_text_encoder_that_trains_stays_and_prompts_are_left_to_it(
    make_recipe: Make, folder: Folder, fake: Any
) -> None:
    family = fake()
    recipe = make_recipe(folder(3), adapter={"kind": "lora", "text_encoder": True})
    batch = next(iter(prepare(recipe, family)))
    assert batch.prompt is None
    assert batch.class_prompt is None
    assert family.captions == []
    assert set(family.networks) == {"denoiser", "text_encoder"}


def test_an_edited_picture_or_caption_is_encoded_again_alone(make_recipe: Make, folder: Folder, fake: Any) -> None:
    photos = folder(4)
    prepare(make_recipe(photos), fake())
    Image.new("RGB", (24, 24), "red").save(photos / "2.png")
    (photos / "1.txt").write_text("another caption")
    family = fake()
    batches = prepare(make_recipe(photos), family)
    assert family.captions == ["another caption"]
    assert family.pictures == 1
    counts = batches.describe()
    assert (counts["latents_read"], counts["latents_made"]) == (3, 1)
    assert (counts["prompts_read"], counts["prompts_made"]) == (3, 1)


@pytest.mark.parametrize(
    ("change", "weights", "pictures", "captions"),
    [
        ({}, "a", 0, 0),
        ({"resolution": 20}, "a", 3, 0),
        ({"flip": True}, "a", 3, 0),  # the mirrored ones; the others are there
        ({}, "b", 3, 3),
        ({"caption_dropout": 0.1}, "a", 0, 1),  # the empty caption
    ],
)
def test_every_setting_that_matters_is_in_the_key(
    change: dict[str, Any], weights: str, pictures: int, captions: int, make_recipe: Make, folder: Folder, fake: Any
) -> None:
    photos = folder(3)
    prepare(make_recipe(photos), fake())
    family = fake(weights)
    prepare(make_recipe(photos, data=change), family)
    assert (family.pictures, len(family.captions)) == (pictures, captions)


def test_a_damaged_entry_is_made_again(make_recipe: Make, folder: Folder, fake: Any, tmp_path: Path) -> None:
    recipe = make_recipe(folder(3))
    whole = list(itertools.islice(prepare(recipe, fake()), 10))
    for entry in (tmp_path / "cache").rglob("*.safetensors"):
        entry.write_bytes(entry.read_bytes()[:-3])
    batches = prepare(recipe, fake())
    assert batches.describe()["latents_damaged"] == 3
    assert batches.describe()["prompts_damaged"] == 3
    assert all(equal(first, second) for first, second in zip(whole, batches, strict=False))


@pytest.mark.parametrize("prior", [{"kind": "none"}, PRIOR, PRIOR | {"layout": "mixed"}, {"kind": "model"}])
def test_one_two_and_four_processes_take_the_same_steps(
    prior: dict[str, Any], make_recipe: Make, folder: Folder, fake: Any
) -> None:
    photos, taken = folder(5), []
    for world, batch, accumulation in ((1, 8, 1), (2, 4, 1), (4, 2, 1), (2, 2, 2), (1, 1, 8)):
        train = {"batch_size": batch, "gradient_accumulation_steps": accumulation}
        recipe = make_recipe(photos, train=train, prior=prior, data={"flip": True, "caption_dropout": 0.2})
        ranks = [prepare(recipe, fake(), Rank(rank, world)) for rank in range(world)]
        samples = []
        for step in range(6):
            parts = [part for rank in ranks for part in steps(rank, step, 1)[0]]
            rows = [row for part in parts for row in zip(part.draws, part.ids, part.captions, strict=True)]
            samples.append(sorted(rows))
        taken.append(samples)
    assert all(other == taken[0] for other in taken[1:])


@pytest.mark.parametrize("first", [0, 1, 3, 50])
def test_any_step_can_be_begun_at(first: int, make_recipe: Make, folder: Folder, fake: Any) -> None:
    train = {"batch_size": 2, "gradient_accumulation_steps": 3}
    recipe = make_recipe(folder(5), train=train, prior=PRIOR, data={"flip": True, "caption_dropout": 0.2})
    uninterrupted = steps(prepare(recipe, fake()), 0, first + 2)[first:]
    resumed = steps(prepare(recipe, fake()), first, 2)
    assert all(
        equal(*pair) for one, other in zip(uninterrupted, resumed, strict=True) for pair in zip(one, other, strict=True)
    )


def test_mixed_batches_are_balanced_over_an_epoch(make_recipe: Make, folder: Folder, fake: Any) -> None:
    recipe = make_recipe(folder(5), train={"batch_size": 2}, prior=PRIOR | {"layout": "mixed"})
    batches = list(itertools.islice(prepare(recipe, fake()), 30))  # six epochs of five and five
    assert {len(batch) for batch in batches} == {2}
    drawn = Counter(id for batch in batches for id in batch.ids)
    assert [drawn[f"0/{index}.png"] for index in range(5)] == [6] * 5
    assert [drawn[f"class: a star/0000{index}.png"] for index in range(6)] == [5] * 6


def test_repeats_and_weights_of_concepts(make_recipe: Make, folder: Folder, fake: Any) -> None:
    recipe = make_recipe(folder(2), folder(3, "more"), train={"batch_size": 4}, prior=PRIOR)
    first, second = recipe.data.concepts
    concepts = [first.model_copy(update={"repeats": 3, "weight": 2.0}), second]
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"concepts": concepts})})
    batches = prepare(recipe, fake())
    assert batches.describe()["draws_per_epoch"] == 9
    drawn = Counter()
    for batch in itertools.islice(batches, 9):  # four epochs
        drawn.update(batch.ids[:4])
        for name, weight, prior in zip(batch.ids, batch.weight, batch.prior, strict=True):
            assert weight == (2.0 if name.startswith("0/") else 1.0)
            assert prior == name.startswith("class")
    assert drawn == {"0/0.png": 12, "0/1.png": 12, "1/0.png": 4, "1/1.png": 4, "1/2.png": 4}


@pytest.mark.parametrize("prior", [{"kind": "none"}, PRIOR, PRIOR | {"layout": "mixed"}])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_balanced_counts_are_exact_over_an_epoch_for_any_number_of_processes(
    world: int, prior: dict[str, Any], make_recipe: Make, folder: Folder, fake: Any
) -> None:
    recipe = make_recipe(folder(2), folder(6, "more"), data={"balance": True}, prior=prior)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_size": 12 // world})})
    ranks = [prepare(recipe, fake(), Rank(rank, world)) for rank in range(world)]
    assert ranks[0].describe()["draws_per_epoch"] == 12
    epochs = 4 if prior.get("layout") == "mixed" else 2  # half of a mixed step are class pictures
    drawn = Counter(name for rank in ranks for step in steps(rank, 0, epochs) for name in step[0].ids)
    own = {name: count for name, count in drawn.items() if not name.startswith("class")}
    assert own == {f"0/{index}.png": 6 for index in range(2)} | {f"1/{index}.png": 2 for index in range(6)}


def test_balanced_batches_can_be_begun_at_any_step(make_recipe: Make, folder: Folder, fake: Any) -> None:
    recipe = make_recipe(folder(2), folder(5, "more"), data={"balance": True}, train={"batch_size": 3})
    whole = steps(prepare(recipe, fake()), 0, 9)
    assert all(
        equal(one[0], other[0]) for one, other in zip(whole[7:], steps(prepare(recipe, fake()), 7, 2), strict=True)
    )


def test_masks_follow_their_pictures_and_leave_class_images_whole(
    make_recipe: Make, folder: Folder, fake: Any, tmp_path: Path
) -> None:
    photos, masks = folder(2), tmp_path / "masks"
    masks.mkdir()
    for index in range(2):
        mask = Image.new("L", (24, 24), 0)
        mask.paste(255, (0, 0, 24, 12) if index == 0 else (0, 0, 12, 24))
        mask.save(masks / f"{index}.png")
    recipe = make_recipe(
        photos, concept={"masks": str(masks)}, data={"flip": True, "unmasked_weight": 0.25}, prior=PRIOR
    )
    seen = set()
    for batch in itertools.islice(prepare(recipe, fake()), 40):
        assert batch.mask is not None
        assert batch.mask.shape == (2, 1, 8, 8)
        assert torch.equal(batch.mask[1], torch.ones(1, 8, 8))
        top, left, right = (float(part.mean()) for part in (batch.mask[0, 0, :4], *batch.mask[0, 0].chunk(2, dim=-1)))
        seen.add((batch.ids[0], top, left, right))
    assert seen == {
        ("0/0.png", 1.0, 0.625, 0.625),
        ("0/1.png", 0.625, 1.0, 0.25),
        ("0/1.png", 0.625, 0.25, 1.0),  # mirrored with its picture
    }


def test_mirroring_mirrors_half_of_the_draws(make_recipe: Make, tmp_path: Path, fake: Any) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 16, 16))
    image.save(photos / "a.png")
    (photos / "a.txt").write_text("a")
    mirrored = 0
    for batch in itertools.islice(prepare(make_recipe(photos, data={"flip": True}), fake()), 200):
        left, right = (float(part.mean()) for part in batch.posterior.mean[0].chunk(2, dim=-1))
        assert {left, right} == {-1.0, 1.0}
        mirrored += right == 1.0
    assert 79 <= mirrored <= 121  # three sigma


def test_geometry_is_each_picture_s_own_and_class_images_have_theirs(
    make_recipe: Make, tmp_path: Path, fake: Any
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (64, 48)).save(photos / "a.png")
    (photos / "a.txt").write_text("a")
    batch = next(iter(prepare(make_recipe(photos, prior=PRIOR), fake())))
    assert batch.geometry.dtype == torch.int64
    assert batch.geometry.tolist() == [[48, 64, 0, 2, 16, 16], [16, 16, 0, 0, 16, 16]]


def test_the_model_as_prior_gets_class_captions_instead_of_pictures(
    make_recipe: Make, folder: Folder, fake: Any
) -> None:
    recipe = make_recipe(folder(3), prior={"kind": "model"}, train={"batch_size": 2})
    for batch in itertools.islice(prepare(recipe, fake()), 5):
        assert batch.class_captions == ("a star", "a star")
        assert not batch.prior.any()
        assert batch.class_prompt is not None
        assert torch.equal(batch.class_prompt.tokens[1], torch.randn(4, 3, generator=generator(0, "a star")))


def test_the_model_as_prior_needs_a_class_prompt(make_recipe: Make, folder: Folder, fake: Any) -> None:
    recipe = make_recipe(folder(2), prior={"kind": "model"}, concept={"class_prompt": None})
    with pytest.raises(UserError, match="prior preservation needs class_prompt"):
        prepare(recipe, fake())


def test_what_an_interrupted_run_left_in_the_cache_is_removed(
    make_recipe: Make, folder: Folder, fake: Any, tmp_path: Path
) -> None:
    left = tmp_path / "cache" / "latents" / "ab" / ".partial-1234-abcd.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    prepare(make_recipe(folder(2)), fake())
    assert left.exists()  # another run may be writing it
    os.utime(left, (0, 0))
    prepare(make_recipe(folder(2, "again")), fake())
    assert not left.exists()


def test_caption_dropout_spares_class_images(make_recipe: Make, folder: Folder, fake: Any) -> None:
    recipe = make_recipe(folder(3), prior=PRIOR, data={"caption_dropout": 0.5})
    drawn = [batch.captions for batch in itertools.islice(prepare(recipe, fake()), 100)]
    assert {captions[1] for captions in drawn} == {"a star"}
    assert 35 <= sum(captions[0] == "" for captions in drawn) <= 65


def test_a_list_of_captions_is_drawn_from_and_all_are_encoded_ahead(
    make_recipe: Make, folder: Folder, fake: Any
) -> None:
    photos = folder(1)
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": ["one", "two"]}))
    family = fake()
    batches = prepare(make_recipe(photos), family)
    assert sorted(family.captions) == ["one", "two"]
    assert {batch.captions[0] for batch in itertools.islice(batches, 40)} == {"one", "two"}


def test_a_batch_moves_to_a_device_whole(make_recipe: Make, folder: Folder, fake: Any) -> None:
    batch = next(iter(prepare(make_recipe(folder(2)), fake())))
    assert equal(batch.to("cpu"), batch)
    assert batch.weight.dtype == torch.float32
    assert batch.prior.dtype == torch.bool


def test_notes_tell_of_cut_captions_and_enlarged_pictures(
    make_recipe: Make, folder: Folder, fake: Any, caplog: pytest.LogCaptureFixture
) -> None:
    photos = folder(3)
    (photos / "1.txt").write_text("zib " + "word " * 14)
    counts = prepare(make_recipe(photos, data={"resolution": 32}), fake()).describe()
    assert counts["captions_cut"] == 1
    assert "3 of 3 pictures are smaller than 32 pixels and are enlarged" in counts["notes"]
    assert "1 of 3 captions are too long" in caplog.text
    assert "loses 3 tokens" in caplog.text


def test_a_resolution_that_the_model_cannot_take(make_recipe: Make, folder: Folder, fake: Any) -> None:
    with pytest.raises(UserError, match=r"data.resolution is 18; .* multiple of 4: 16 or 20"):
        prepare(make_recipe(folder(2), data={"resolution": 18}), fake())


def test_an_encoder_that_breaks_down_names_the_picture(make_recipe: Make, folder: Folder, fake: Any) -> None:
    family, encode = fake(), fake.encode_image

    def broken(pixels: Tensor) -> Any:
        posterior = encode(family, pixels)
        posterior.mean[0, 0, 0, 0] = float("nan")
        return posterior

    family.encode_image = broken
    with pytest.raises(GuardError, match=r"0.png: the image encoder gives numbers that are not finite"):
        prepare(make_recipe(folder(2)), family)
