"""What a plan says of launching: the simplest profile that fits, with its reason, and nothing that training refuses."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from finetune.config import Recipe, read_recipe
from finetune.engines.pieces import require_divisible, require_plain
from finetune.errors import UserError
from finetune.plan import Advice, Plan, Way, plan, render
from finetune.plan.advice import _advice as advice_of
from finetune.plan.advice import _way, refusal
from finetune.plan.contents import Memory
from finetune.plan.launches import launches
from finetune.plan.weights import Weight

PLAIN = ["recipe=lora", "adapter={kind: lora, rank: 4}"]
FULL = ["recipe=full", "adapter={kind: full}"]


@pytest.fixture
def folder(tmp_path: Path, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a recipe and a picture."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "pictures" / "0.png")
    text = "recipe: lora\noutput: run\nadapter: {kind: lora, rank: 4}\nreport: {enabled: false}\n"
    text += f"model: {{path: {tiny_sd}}}\ntrain: {{steps: 3}}\n"
    text += "data: {resolution: 16, concepts: [{folder: pictures, prompt: a star, class_prompt: a star}]}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path


def read(*settings: str) -> Recipe:
    return read_recipe(Path("recipe.yaml"), settings)


def advice(*settings: str, processes: int = 4, room: int | None = None) -> Advice:
    found = plan(read(*settings), processes, room=room, file="recipe.yaml").advice
    assert found
    return found


def needs(found: Advice) -> dict[str, int]:
    return {way.launch: way.bytes for way in found.ways if not way.refused}


def test_an_adapter_that_fits_takes_ddp_and_is_told_what_others_would_save(folder: Path) -> None:
    found = advice(room=2**33)
    assert found.launch == "ddp"
    assert "weights train; ddp fits into 8 GiB" in found.reason and "would save" in found.reason
    assert found.command == "finetune train recipe.yaml --launch ddp -- --num_processes 4"
    assert not {"cpu", "cpu-2", "single", "ddp-nodes", "zero3-nodes"} & needs(found).keys()


def test_one_process_needs_no_launcher(folder: Path) -> None:
    found = advice(processes=1, room=2**33)
    assert (found.launch, found.command) == ("single", "finetune train recipe.yaml")
    assert all(way.sent == 0 for way in found.ways)


@pytest.mark.parametrize("settings", [PLAIN, FULL])
def test_each_profile_is_taken_where_the_simpler_ones_do_not_fit(settings: list[str], folder: Path) -> None:
    ways = advice(*settings).ways
    taken = set()
    for place, way in enumerate(ways):
        found = advice_of(ways, 10**6, 4, way.bytes, "recipe.yaml")
        expected = next(one.launch for one in ways[: place + 1] if one.bytes <= way.bytes)
        assert found.launch == expected
        if expected != "ddp":
            assert found.reason.startswith("ddp needs") and f"{expected} on 4 processes fits" in found.reason
        taken.add(found.launch)
    assert len(taken) > 1
    found = advice_of(ways, 10**6, 4, 1000, "recipe.yaml")
    assert (found.launch, found.command) == (None, None)
    assert "nothing fits into 1000 bytes on 4 processes: the least is " in found.reason


@pytest.mark.parametrize(
    ("sizes", "launch"),
    [
        ({"ddp": 14, "zero2": 13, "fsdp2": 9, "zero3": 8}, "ddp"),  # an adapter
        ({"ddp": 41, "zero2": 19, "fsdp2": 12, "zero3": 11}, "zero2"),  # full
        ({"ddp": 190, "zero2": 49, "fsdp2": 21, "zero3": 20}, "fsdp2"),
        ({"ddp": 190, "zero2": 49, "fsdp2": 25, "zero3": 20}, "zero3"),
        ({"ddp": 190, "zero2": 49, "fsdp2": 25, "zero3": 25, "zero2-offload": 20}, "zero2-offload"),
        ({"ddp": 190, "zero2": 49}, None),
    ],
)
def test_the_first_that_fits_into_24_is_taken(sizes: dict[str, int], launch: str | None) -> None:
    ways = [Way(launch=name, bytes=size, phase="a step") for name, size in sizes.items()]
    assert advice_of(ways, 10**6, 4, 24, "recipe.yaml").launch == launch


def test_without_a_gpu_named_it_asks_for_one_and_a_profile_names_one(folder: Path) -> None:
    assert "--gpu-memory" in advice().reason
    found = advice("profile=8gb", "model.quantize=null", "model.block_swap=0")
    assert found.room == int(8 * 2**30 * 0.95) and "--gpu-memory" not in found.reason


def test_on_a_cpu_the_profile_of_cpus_is_advised(folder: Path) -> None:
    assert advice("train.device=cpu", processes=2).launch == "cpu-2"


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        (["train.optimizer={name: adafactor}"], {"zero1", "zero2", "zero3", "fsdp2"}),
        (["train.mixed_precision=fp16"], {"zero1", "zero2", "zero3", "fsdp2"}),
        (["model.quantize={kind: int8}"], {"zero3", "fsdp2"}),
        (["model.block_swap=1", "train.gradient_checkpointing=true"], {"zero3", "fsdp2"}),
        ([*FULL, "prior={kind: model}"], {"zero3", "fsdp2"}),
        ([], set()),
    ],
)
def test_what_training_refuses_is_refused_in_its_words(settings: list[str], refused: set[str], folder: Path) -> None:
    recipe, known = read(*settings), launches()
    said = {name: refusal(recipe, known[name]) for name in ("ddp", "zero1", "zero2", "zero3", "fsdp2")}
    assert {name for name, why in said.items() if why} == refused
    for name in refused:
        with pytest.raises(UserError) as error:
            require_divisible(recipe.train, "FSDP2" if name == "fsdp2" else "ZeRO")
            require_plain(recipe, "FSDP2" if name == "fsdp2" else "DeepSpeed ZeRO-3")
        assert said[name] == str(error.value)


def test_what_is_refused_is_not_advised_though_it_would_fit(folder: Path) -> None:
    found = advice("recipe=full", "adapter={kind: full}", "train.optimizer={name: adafactor}", room=1000)
    assert found.launch is None and needs(found).keys() == {"ddp"}
    assert all("adafactor does not work with" in (way.refused or "") for way in found.ways[1:])


def test_networks_that_are_dealt_out_are_whole_at_first(folder: Path) -> None:
    ways = {way.launch: way for way in advice(*FULL).ways}
    whole = plan(read(*FULL)).memory
    assert all(ways[name].bytes >= whole.parts["weights"] for name in ("zero3", "fsdp2", "zero3-offload"))


def test_the_terminal_and_json_say_it(folder: Path) -> None:
    found: Plan = plan(read(), 2, room=2**33)
    out = io.StringIO()
    render(found, Console(file=out, width=200))
    assert found.advice and found.advice.reason in out.getvalue() and str(found.advice.command) in out.getvalue()
    again = json.loads(json.dumps(dataclasses.asdict(found)))["advice"]
    assert again["launch"] == "ddp" and {way["launch"] for way in again["ways"]} >= {"zero2", "fsdp2"}


def test_a_profile_of_ones_own_is_considered_and_a_broken_one_is_not(folder: Path) -> None:
    own = folder / "launch" / "accelerate"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("{distributed_type: MULTI_GPU, num_processes: 4, num_machines: 1, use_cpu: false}")
    (own / "broken.yaml").write_text("distributed_type: DEEPSPEED")
    assert "mine" in launches() and "broken" not in launches()


@pytest.mark.parametrize("name", ["zero3", "fsdp2", "zero3-offload", "fsdp2-offload"])
def test_a_base_larger_than_a_gpu_begins_where_it_is_cut(name: str, folder: Path) -> None:
    """It is cut on the host, one weight after the other, so that only the host must hold all of it."""
    base = [Weight((20_000, 20_000), unit=f"block {number}") for number in range(40)]
    all_of_it = 4 * 40 * 20_000**2  # 64 GB
    memory = Memory(parts={"weights": all_of_it}, formula="")
    way = _way(read(), launches()[name], base, memory, 0, 8)
    assert way.phase == "a step" and way.bytes < all_of_it / 4 and way.host == all_of_it
