"""What a plan says is what a run would do."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from finetune.adapters import attach
from finetune.config import Recipe, lock, read_recipe
from finetune.config.adapters import LoraConfig
from finetune.config.schema import ModelConfig
from finetune.errors import UserError
from finetune.families import load_family
from finetune.plan import Plan, plan, render

RECIPE = """\
recipe: dreambooth
output: run
adapter: {{kind: lora, rank: 4}}
model: {{path: {model}}}
data:
  resolution: 16
  concepts:
  - {{folder: pictures, prompt: a photo of zib star, trigger: zib, class_prompt: a photo of a star, repeats: 3}}
prior: {{kind: images, count: 8}}
train: {{steps: 30, batch_size: 2, gradient_accumulation_steps: 2}}
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a recipe and five pictures, two with captions of their own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for number in range(5):
        Image.new("RGB", (20 + number, 16), (40 * number, 10, 200)).save(tmp_path / "pictures" / f"{number}.png")
    for number in range(2):
        (tmp_path / "pictures" / f"{number}.txt").write_text(f"zib star number {number}")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_sd))
    return tmp_path


def read(*overrides: str) -> Recipe:
    return read_recipe(Path("recipe.yaml"), overrides)


@pytest.fixture
def planned(folder: Path) -> Plan:
    return plan(read(), processes=2)


def test_pictures_and_where_their_captions_come_from(planned: Plan) -> None:
    (concept,) = planned.concepts
    assert concept.pictures == 5
    assert concept.captions == {"their own": 2, "the prompt": 3}
    assert (concept.smallest, concept.largest) == ((20, 16), (24, 16))


def test_steps_epochs_and_what_a_step_holds(planned: Plan) -> None:
    found = planned.arithmetic
    assert found.subject_pictures == found.class_pictures == 2 * 2 * 2
    assert found.draws_per_epoch == 15
    assert found.epochs == 30 * 8 / 15


def test_half_of_a_mixed_step_is_of_the_class(folder: Path) -> None:
    found = plan(read("prior.layout=mixed")).arithmetic
    assert found.subject_pictures == found.class_pictures == 2


def test_class_images_and_encodings_that_are_there_are_counted(planned: Plan) -> None:
    (images,) = planned.class_images
    assert (images.needed, images.present) == (8, 0)
    pictures, captions = planned.caches
    assert (pictures.entries, pictures.present) == (5 + 8, 0)
    assert pictures.bytes == 13 * 2 * 4 * 8 * 8 * 4  # mean and logvar of 4 channels of 8 x 8 cells
    assert captions.entries == 4  # two of their own, the prompt, the class prompt
    Path(images.folder).mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(Path(images.folder) / "00000.png")
    assert plan(read()).class_images[0].present == 1


def test_it_counts_what_a_run_would_train(planned: Plan, tiny_sd: Path) -> None:
    family = load_family(ModelConfig(path=str(tiny_sd)))
    (group,) = attach(LoraConfig(kind="lora", rank=4), family, 0).groups()
    assert planned.trainable == {"denoiser": sum(p.numel() for p in group.parameters.values())}
    base = load_family(ModelConfig(path=str(tiny_sd)))
    base.require("denoiser", "vae", "text_encoder")
    assert planned.networks == {name: sum(p.numel() for p in part.parameters()) for name, part in base.networks.items()}


def test_memory_grows_with_what_needs_it(folder: Path) -> None:
    lora, full = plan(read()).memory, plan(read("adapter.kind=full")).memory
    assert full.parts["adamw states"] > lora.parts["adamw states"]
    assert full.total > lora.total
    average = plan(read("train.ema={decay: 0.9}")).memory
    assert average.total - lora.total == average.parts["moving average"] == lora.parts["gradients"]
    frugal = plan(read("train.gradient_checkpointing=true")).memory
    assert frugal.total < lora.total


def test_memory_counts_what_each_optimizer_keeps(folder: Path) -> None:
    adamw = plan(read()).memory.parts["adamw states"]
    others = {name: plan(read(f"train.optimizer.name={name}")).memory for name in ("lion", "came", "schedulefree")}
    assert others["lion"].parts["lion states"] == adamw // 2
    assert others["schedulefree"].parts["schedulefree states"] == adamw
    assert adamw // 2 < others["came"].parts["came states"] < adamw
    unknown = plan(read("train.optimizer.name=torch.optim.RAdam")).memory
    assert "torch.optim.RAdam states" not in unknown.parts
    assert "torch.optim.RAdam's states (not counted)" in unknown.formula


def test_memory_counts_how_the_base_is_held(folder: Path) -> None:
    plain = plan(read()).memory
    halves = plan(read("model.dtype=bfloat16")).memory
    packed = plan(read("model.quantize={kind: nf4}")).memory
    assert halves.parts["weights"] < 0.6 * plain.parts["weights"]
    assert halves.parts["weights"] < packed.parts["weights"] < plain.parts["weights"]  # convolutions are not packed
    frugal = "train.gradient_checkpointing=true"
    swapped = plan(read("model.block_swap=2", frugal)).memory
    assert swapped.host + swapped.parts["weights"] == plain.parts["weights"]
    assert 0 < swapped.parts["blocks on their way"] <= swapped.host


def test_memory_counts_what_pissa_sets_aside(folder: Path) -> None:
    plain, pissa = (plan(read(f"adapter.init={init}")).memory for init in ("kaiming", "pissa"))
    family = load_family(ModelConfig(path=read().model.path))
    adapter = attach(LoraConfig(kind="lora", rank=4, init="pissa"), family, 0)
    assert pissa.total - plain.total == pissa.parts["set aside by the adapter"] == adapter.bytes_beside() > 0


def test_all_networks_are_in_memory_while_pictures_are_drawn(folder: Path) -> None:
    drawn, quiet = (plan(read("prior={kind: none}", f"report.enabled={on}")).memory for on in ("true", "false"))
    assert drawn.phases["drawing"] > drawn.phases["encoding"]
    assert set(quiet.phases) == {"encoding"}
    assert drawn.most >= drawn.phases["drawing"]


def test_a_plan_says_what_a_profile_set_and_which_would_do(folder: Path) -> None:
    found = plan(read("profile=12gb", "model.vae_tiling=false"), profiles=True)
    assert found.profile["train.gradient_checkpointing"] is True
    assert "model.vae_tiling" not in found.profile
    assert [fit.profile for fit in found.fits] == ["8gb", "12gb", "16gb", "24gb", "80gb"]
    needed = [fit.bytes for fit in found.fits]
    assert needed == sorted(needed)
    assert needed[1] == found.memory.most
    page = io.StringIO()
    render(found, Console(file=page, width=400))
    assert "16gb: about" in page.getvalue()
    assert 'train.mixed_precision: "bf16"' in page.getvalue()


def test_files_that_will_be_there(planned: Plan, folder: Path) -> None:
    assert "adapters/pytorch_lora_weights.safetensors" in planned.output.files
    assert planned.output.state == "new"
    assert "adapters/model/" in plan(read("adapter.kind=full")).output.files


def test_an_output_that_holds_another_run_is_said(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "recipe.lock.yaml").write_text(lock(read()))
    assert plan(read()).output.state == "holds this run, which begins again"
    assert "holds another run" in plan(read("train.learning_rate=1e-5")).output.state


def test_it_leaves_no_trace_but_drawn_subjects(planned: Plan, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["pictures", "recipe.yaml"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.concepts.0.folder=picturse"], "did you mean 'pictures'?"),
        (["data.resolution=17"], "needs a multiple of"),
        (["adapter.targets=atention"], "did you mean 'attention'?"),
        (["model.path=nowhere"], "nowhere"),
    ],
)
def test_what_training_would_refuse_is_refused(folder: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        plan(read(*overrides))


def test_it_reads_well_and_is_json(planned: Plan) -> None:
    json.dumps(dataclasses.asdict(planned))
    page = io.StringIO()
    render(planned, Console(file=page, width=400))
    said = " ".join(page.getvalue().split())
    assert "30 steps, each of 8 subject pictures and 8 of the class (2 processes x 2 a batch x 2 accumulated)" in said
    assert "'a photo of a star': 0 of 8 are there, 8 to draw" in said
    assert "holds" not in said
