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
from finetune.plan import Advice, Plan, plan, render
from finetune.plan.advice import refusal
from finetune.plan.launches import launches

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


def test_each_profile_is_taken_where_the_simpler_ones_do_not_fit(folder: Path) -> None:
    for settings in (PLAIN, FULL):
        sizes = needs(advice(*settings))
        for name, size in sizes.items():
            found = advice(*settings, room=size)
            simpler = list(sizes)[: list(sizes).index(name)]
            expected = next((one for one in simpler if sizes[one] <= size), name)
            assert found.launch == expected
            if expected != "ddp":
                assert found.reason.startswith("ddp needs") and f"{expected} on 4 processes fits" in found.reason


def test_what_fits_nowhere_is_said_with_the_least_of_all(folder: Path) -> None:
    found = advice(room=1000)
    assert (found.launch, found.command) == (None, None)
    assert "nothing fits into 1000 bytes on 4 processes: the least is " in found.reason


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
def test_what_training_refuses_is_not_advised_and_says_why(
    settings: list[str], refused: set[str], folder: Path
) -> None:
    found = advice(*settings)
    plain = {way.launch for way in found.ways if way.refused and "-" not in way.launch}
    assert plain == refused
    assert found.launch == "ddp"
    recipe = read(*settings)
    for name in refused:
        launch = launches()[name]
        with pytest.raises(UserError) as error:
            require_divisible(recipe.train, "FSDP2" if name == "fsdp2" else "ZeRO")
            require_plain(recipe, {"zero3": "DeepSpeed ZeRO-3"}.get(name, "FSDP2"))
        assert refusal(recipe, launch) == str(error.value)


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
