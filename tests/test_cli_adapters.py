"""``finetune convert``, ``merge``, ``extract``, ``resize`` and ``prune`` on the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import cli
from finetune.randomness import generator


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["finetune", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture
def lora(tiny_sd: Path, tmp_path: Path) -> Path:
    tensors = {}
    for block in ("down_blocks.0.attentions.0", "mid_block.attentions.0"):
        for part in ("to_q", "to_k"):
            stem = f"unet.{block}.transformer_blocks.0.attn1.{part}"
            draw = generator(0, stem)
            tensors[f"{stem}.lora_A.weight"] = torch.randn(4, 16, generator=draw)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(16, 4, generator=draw)
    save_file(tensors, tmp_path / "lora.safetensors", {"finetune.base": str(tiny_sd)})
    return tmp_path / "lora.safetensors"


def test_every_verb_writes_and_verifies(lora, tiny_sd, monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    verbs = {
        "k": ("convert", lora, "--to", "kohya", "--dtype", "float16"),
        "m": ("merge", lora, lora, "--weights", "0.5,-1", "--to", "kohya"),
        "t": ("merge", lora, lora, "--method", "dare-ties", "--drop", "0.2", "--rank", "8"),
        "r": ("resize", lora, "--energy", "0.7", "--rank", "3"),
        "p": ("prune", lora, "--drop", "mid_block"),
    }
    for name, arguments in verbs.items():
        path = out / f"{name}.safetensors"
        assert run(monkeypatch, *arguments, "--out", path) == 0
        said = capsys.readouterr().out
        assert "ok    diffusers: merged weights" in said and "FAIL" not in said
        assert path.is_file()
    assert "2 layers kept, 2 dropped" in said
    assert run(monkeypatch, "merge", lora, "--into", tiny_sd, "--strength", "0.5", "--out", out / "model") == 0
    said = capsys.readouterr().out
    assert "4 weights changed" in said and "ok    diffusers: every weight arrives" in said
    assert run(monkeypatch, "extract", out / "model", tiny_sd, "--rank", "4", "--out", out / "x.safetensors") == 0
    assert "4 layers of rank 4 to 4, 100.00% of the squares" in capsys.readouterr().out
    key = next(iter(load_file(lora))).partition(".lora_")[0]
    whole = [load_file(path) for path in (lora, out / "x.safetensors")]
    products = [one[f"{key}.lora_B.weight"] @ one[f"{key}.lora_A.weight"] for one in whole]
    torch.testing.assert_close(products[1], 0.5 * products[0], rtol=1e-4, atol=1e-5)


def test_mistakes_end_with_2(lora, tiny_sd, monkeypatch, capsys, tmp_path):
    out = tmp_path / "no.safetensors"
    for words, arguments in {
        "expected numbers with commas": ("merge", lora, "--weights", "1;2"),
        "2 weights": ("merge", lora, "--weights", "1,2"),
        "--rank is for merging": ("merge", lora, "--into", tiny_sd, "--rank", "2"),
        "--density has no part in --method svd": ("merge", lora, lora, "--method", "svd", "--density", "0.5"),
        "--seed has no part in --method ties": ("merge", lora, lora, "--method", "ties", "--seed", "0"),
        "--strength is for --into": ("merge", lora, "--strength", "2"),
        "say a rank": ("resize", lora),
        "no layout 'comfyui' of a lora": ("convert", lora, "--to", "comfyui"),
        "no such file": ("convert", tmp_path / "none.safetensors", "--to", "kohya"),
    }.items():
        assert run(monkeypatch, *arguments, "--out", out) == 2
        assert words in capsys.readouterr().err
    assert not out.exists()


def test_a_base_that_is_not_here_is_said(lora, monkeypatch, capsys, tmp_path):
    """The file is written by the names of the published model, and not verified."""
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    factors = {f"{stem}.lora_A.weight": torch.ones(2, 768), f"{stem}.lora_B.weight": torch.ones(1280, 2)}
    save_file(factors, tmp_path / "far.safetensors", {"finetune.base": str(tmp_path / "gone")})
    assert run(monkeypatch, "convert", tmp_path / "far.safetensors", "--to", "kohya", "--out", tmp_path / "k.st") == 2
    assert "written as .safetensors" in capsys.readouterr().err
    out = tmp_path / "k.safetensors"
    assert run(monkeypatch, "convert", tmp_path / "far.safetensors", "--to", "kohya", "--out", out) == 0
    assert "written, not verified: " in capsys.readouterr().out
    assert f"lora_{stem.replace('.', '_')}.alpha" in load_file(out)


def test_push_writes_the_folder_and_lists_it(lora, monkeypatch, capsys, tmp_path):
    place = tmp_path / "out"
    assert run(monkeypatch, "push", lora, "me/zib", "--license", "mit", "--dry-run", place) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-2:] == [str(place / "README.md"), str(place / "lora.safetensors")]
    assert said.startswith("note: lora.safetensors: its header says that its base lies in ")
    assert "license: mit" in (place / "README.md").read_text(encoding="utf-8")
    assert run(monkeypatch, "push", lora, "zib", "--dry-run", tmp_path / "no") == 2
    assert "expected owner/name" in capsys.readouterr().err


def test_push_without_a_token_says_what_to_do(lora, monkeypatch, capsys):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    def refuse(*_: object, **__: object) -> None:
        raise LocalTokenNotFoundError("Token is required")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    assert run(monkeypatch, "push", lora, "me/zib") == 2
    assert "me/zib: you are not logged in; run `hf auth login`" in capsys.readouterr().err
