"""The command line: verbs, exit codes, what goes where."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune import cli
from finetune.config import Recipe, command, read_recipe
from finetune.errors import GuardError, Stopped, UserError

ROOT = Path(__file__).parents[1]
GOOD = """\
recipe: dreambooth
output: run
adapter: {kind: lora, rank: 4}
data:
  resolution: 64
  concepts:
  - {folder: pictures, prompt: a photo of zib star, trigger: zib, class_prompt: a photo of a star}
prior: {kind: images, count: 8}
train: {steps: 20}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "star.yaml"
    path.write_text(GOOD, encoding="utf-8")
    return path


def finetune(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Run the command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["finetune", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_validate_says_ok_and_what_the_recipe_does(recipe, monkeypatch, capsys) -> None:
    assert finetune(monkeypatch, "validate", recipe, "train.steps=7") == 0
    said = capsys.readouterr()
    assert said.out.startswith("ok: dreambooth trains LoRA of rank 4 on attention of tinyworld")
    assert "7 steps" in said.out
    assert not said.err


def test_validate_ends_with_2_and_every_mistake_on_stderr(recipe, monkeypatch, capsys) -> None:
    recipe.write_text(GOOD.replace("rank: 4", "rank: 0").replace("steps", "stpes"), encoding="utf-8")
    assert finetune(monkeypatch, "validate", "star.yaml") == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.splitlines() == [
        "star.yaml:3: adapter.rank must be a positive integer, not 0",
        "star.yaml:9: train.stpes is not a key; did you mean 'steps'?",
    ]


def test_validating_loads_no_torch(recipe) -> None:
    code = (
        f"import sys; sys.argv = ['finetune', 'validate', {str(recipe)!r}]\n"
        "import finetune.cli\n"
        "try: finetune.cli.main()\nexcept SystemExit as ended: assert not ended.code\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_schema_is_json_that_knows_every_key(monkeypatch, capsys) -> None:
    assert finetune(monkeypatch, "schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == {"extends", *Recipe.model_fields}
    rank = schema["$defs"]["LoraConfig"]["properties"]["rank"]
    assert rank["exclusiveMinimum"] == 0 and rank["description"]


def test_the_reference_is_what_the_schema_says(monkeypatch, capsys) -> None:
    assert finetune(monkeypatch, "schema", "--markdown") == 0
    written = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert written == capsys.readouterr().out, "stale: finetune schema --markdown > docs/recipes.md"


def test_every_key_of_a_recipe_is_described() -> None:
    from finetune.config.describe import is_section, options, sections

    for listed in sections():
        for name, field in listed.section.model_fields.items():
            told = field.description or name == "kind" or any(map(is_section, options(field.annotation)))
            assert told, f"{listed.section.__name__}.{name} has no docstring"


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("bad"), 2), (Stopped("stopped"), 3), (GuardError("guarded"), 4)],
)
def test_a_run_ends_with_the_code_of_its_error(recipe, monkeypatch, capsys, error, code) -> None:
    def main(_: Recipe) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "recipes.dreambooth", SimpleNamespace(main=main))
    assert finetune(monkeypatch, "train", recipe) == code
    assert capsys.readouterr().err == f"{error}\n"


def test_an_error_of_the_toolkit_itself_keeps_its_traceback(recipe, monkeypatch) -> None:
    def main(_: Recipe) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(sys.modules, "recipes.dreambooth", SimpleNamespace(main=main))
    monkeypatch.setattr(sys, "argv", ["finetune", "train", str(recipe)])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_train_hands_the_resolved_recipe_to_its_page(recipe, monkeypatch) -> None:
    seen: list[Recipe] = []
    monkeypatch.setitem(sys.modules, "recipes.dreambooth", SimpleNamespace(main=seen.append))
    assert finetune(monkeypatch, "train", recipe, "train.steps=3", "output=elsewhere") == 0
    assert seen[0].train.steps == 3 and seen[0].output == "elsewhere"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What ``--launch`` would become."""
    commands: list[list[str]] = []

    def become(_: str, arguments: list[str]) -> None:
        commands.append(arguments)
        raise SystemExit(0)

    monkeypatch.setattr(command.os, "execv", become)
    return commands


def test_launch_becomes_accelerates_launcher_with_the_named_profile(recipe, monkeypatch, launched) -> None:
    assert finetune(monkeypatch, "train", recipe, "train.steps=3", "--launch", "cpu-2") == 0
    python, *rest = launched[0]
    assert python == sys.executable
    assert rest[:3] == ["-m", "finetune.launch", "--config_file"]
    assert Path(rest[3]) == ROOT / "launch" / "accelerate" / "cpu-2.yaml"
    assert Path(rest[4]) == ROOT / "recipes" / "dreambooth.py"
    assert rest[5:] == ["--config", str(recipe), "train.steps=3"]


def test_what_follows_two_dashes_is_the_launchers(recipe, monkeypatch, capsys, launched) -> None:
    options = ["--num_processes", "8", "--machine_rank=1"]
    assert finetune(monkeypatch, "train", recipe, "train.steps=3", "--launch", "cpu-2", "--", *options) == 0
    page = launched[0].index(str(ROOT / "recipes" / "dreambooth.py"))
    assert launched[0][5:page] == options
    assert launched[0][page + 1 :] == ["--config", str(recipe), "train.steps=3"]
    assert finetune(monkeypatch, "train", recipe, "--", "--num_processes", "8") == 2
    assert "--num_processes: an option of accelerate launch" in capsys.readouterr().err


def test_a_profile_of_ones_own_is_a_file_or_lies_below_the_current_folder(recipe, monkeypatch, launched) -> None:
    for own in (Path("mine.yaml"), Path("launch/accelerate/cpu-2.yaml")):
        own.parent.mkdir(parents=True, exist_ok=True)
        own.touch()
    finetune(monkeypatch, "train", recipe, "--launch", "mine.yaml")
    finetune(monkeypatch, "train", recipe, "--launch", "cpu-2")
    assert launched[0][4] == "mine.yaml"
    assert Path(launched[1][4]) == recipe.parent / "launch/accelerate/cpu-2.yaml"


def test_launch_finds_mistakes_before_anything_starts(recipe, monkeypatch, capsys, launched) -> None:
    assert finetune(monkeypatch, "train", recipe, "--launch", "cpu2") == 2
    assert "did you mean 'cpu-2'?" in capsys.readouterr().err
    assert finetune(monkeypatch, "train", recipe, "--launch", "cpu-2", "trian.steps=3") == 2
    assert "did you mean 'train'?" in capsys.readouterr().err
    assert not launched


@pytest.mark.parametrize(
    "arguments", [["--config", "star.yaml", "train.steps=3"], ["train.steps=3", "--config=star.yaml"]]
)
def test_a_page_started_by_hand_reads_its_arguments(recipe, arguments) -> None:
    seen: list[Recipe] = []
    command.run(seen.append, arguments)
    assert seen[0].train.steps == 3


@pytest.mark.parametrize(
    "arguments",
    [[], ["--config"], ["star.yaml"], ["--config", "star.yaml", "--steps", "3"], ["--config=a", "--config=b"]],
)
def test_a_page_started_wrongly_says_how(recipe, capsys, arguments) -> None:
    with pytest.raises(SystemExit) as ended:
        command.run(lambda _: None, arguments)
    assert ended.value.code == 2
    assert "--config RECIPE.yaml [key=value ...]" in capsys.readouterr().err


def test_a_mistake_in_a_recipe_is_said_by_one_process_alone(recipe, monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        command.run(lambda _: None, ["--config", "star.yaml", "trian.steps=3"])
    assert not capsys.readouterr().err

    def main(_: Recipe) -> None:
        raise UserError("only this process sees it")

    with pytest.raises(SystemExit):
        command.run(main, ["--config", "star.yaml"])
    assert capsys.readouterr().err == "rank 1: only this process sees it\n"


def test_version_and_unknown_verbs(monkeypatch, capsys) -> None:
    import finetune as package

    assert finetune(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == package.__version__
    assert finetune(monkeypatch, "trian") == 2


def test_models_and_tokens(monkeypatch, capsys, tiny_sd) -> None:
    assert finetune(monkeypatch, "models") == 0
    assert capsys.readouterr().out.startswith("| family | models | lora |")
    assert finetune(monkeypatch, "tokens", tiny_sd, "--count", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(len(line.split("\t")) == 3 and "norm" in line for line in lines)


def test_sample_writes_pictures_and_verify_judges_them(monkeypatch, capsys, tmp_path, tiny_sd) -> None:
    prompts = ["--prompt", "a red star", "--prompt", "a dog", "--count", "2", "--steps", "1", "--resolution", "16"]
    assert finetune(monkeypatch, "sample", tiny_sd, *prompts, "--out", tmp_path / "drawn") == 0
    names = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert names == ["00-0.png", "00-1.png", "01-0.png", "01-1.png"]
    one = ["--prompt", "a dog", "--steps", "1", "--resolution", "16", "--out", tmp_path / "dog.png"]
    assert finetune(monkeypatch, "sample", tiny_sd, *one) == 0
    assert (tmp_path / "dog.png").is_file()
    capsys.readouterr()
    assert finetune(monkeypatch, "verify", tmp_path / "nothing.safetensors") == 2
    assert finetune(monkeypatch, "sample", tmp_path / "nothing.safetensors", "--prompt", "a") == 2
    assert "nothing.safetensors" in capsys.readouterr().err


def test_tinyworld_draws_a_subject_and_refuses_a_folder_in_use(monkeypatch, capsys, tmp_path) -> None:
    assert finetune(monkeypatch, "tinyworld", "subject", "--seed", "11", "--out", tmp_path / "s") == 0
    assert len(list((tmp_path / "s" / "instance").glob("*.png"))) == 5
    assert finetune(monkeypatch, "tinyworld", "style", "--seed", "11", "--out", tmp_path / "s") == 2
    assert "holds other files already" in capsys.readouterr().err
    assert finetune(monkeypatch, "tinyworld", "captions", "--count", "2") == 0
    assert [set(json.loads(line)) for line in capsys.readouterr().out.splitlines()] == [{"text", "factors"}] * 2


def test_evaluate_wants_a_run(monkeypatch, capsys, recipe) -> None:
    assert finetune(monkeypatch, "evaluate", recipe) == 2
    assert "holds no run" in capsys.readouterr().err


TWO = GOOD.replace(
    "prior:",
    "  - {folder: more/rex, prompt: a photo of <wug> cross, trigger: <wug>, class_prompt: a cross}\n"
    "  - {folder: more/rex, prompt: a photo of wug ring, trigger: wug, class_prompt: a ring}\nprior:",
)


def test_each_concept_gets_a_run_of_its_own(recipe, monkeypatch) -> None:
    recipe.write_text(TWO, encoding="utf-8")
    asked: list[Recipe] = []

    def run(command_line: list[str], check: bool) -> SimpleNamespace:
        assert command_line[1:4] == ["-m", "finetune", "train"] and command_line[-2:] == ["--launch", "cpu-2"]
        asked.append(read_recipe(Path(command_line[4]), command_line[5:-2]))
        return SimpleNamespace(returncode=3 if len(asked) == 3 else 0)

    monkeypatch.setattr(command.subprocess, "run", run)
    changes = ["train.steps=7", "data.concepts.0.weight=2"]
    assert finetune(monkeypatch, "train", "--each-concept", "--launch", "cpu-2", recipe, *changes) == 3
    assert [one.output for one in asked] == ["run/zib", "run/wug", "run/wug-2"]
    assert [one.data.concepts for one in asked] == [[one] for one in read_recipe(recipe, changes).data.concepts]
    assert {one.train.steps for one in asked} == {7}


def test_a_wrong_recipe_starts_no_run_of_any_concept(recipe, monkeypatch) -> None:
    monkeypatch.setattr(command.subprocess, "run", lambda *_, **__: pytest.fail("was started"))
    assert finetune(monkeypatch, "train", "--each-concept", recipe, "train.steps=0") == 2
