"""How much memory the tools take beside what the libraries do, on files that are large for a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from finetune.families.tiny import drawn
from finetune.randomness import generator

RANK, WIDTH = 1024, 320
MEASURED = """
import json, sys, torch
from pathlib import Path
from finetune.export.tools import convert, extract, lowrank, merge, merge_into, method, prune, resize
from finetune.families import load_family
from finetune.config.schema import ModelConfig
model, (one, two, out) = sys.argv[1], map(Path, sys.argv[2:])
load_family(ModelConfig(path=model))
torch.linalg.svd(torch.randn(64, 64)); torch.linalg.qr(torch.randn(64, 8))

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS")
{code}
print(json.dumps(status("VmHWM") - before))
"""


@pytest.fixture(scope="module")
def large(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose U-Net is a file of about 100 MB, and LoRAs of it of twice as much."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "model").mkdir()
    for part in tiny_sd.iterdir():
        (folder / "model" / part.name).symlink_to(part)
    (folder / "model" / "unet").unlink()
    settings = {**UNet2DConditionModel.load_config(tiny_sd, subfolder="unet"), "block_out_channels": (WIDTH, WIDTH)}
    with drawn(0):
        unet = UNet2DConditionModel.from_config(settings)
    unet.save_pretrained(folder / "model" / "unet")
    for seed in (0, 1):
        tensors = {}
        for name, module in unet.named_modules():
            if isinstance(module, torch.nn.Linear) and min(module.weight.shape) >= WIDTH:
                (height, width), draw = module.weight.shape, generator(seed, name)
                tensors[f"unet.{name}.lora_A.weight"] = 0.01 * torch.randn(RANK, width, generator=draw)
                tensors[f"unet.{name}.lora_B.weight"] = 0.01 * torch.randn(height, RANK, generator=draw)
        save_file(tensors, folder / f"{seed}.safetensors", {"finetune.base": str(folder / "model")})
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux' /proc")
@pytest.mark.parametrize(
    "code",
    [
        "convert.convert(one, out, 'kohya')",
        "convert.convert(one, out, 'kohya', dtype='float16')",
        "resize.resize(one, out, lowrank.Rule(energy=0.5))",
        "prune.prune(one, out, drop=['mid_block'])",
        "merge.merge([one, two], out, method.Method('concat', (1.0, 1.0)))",
        "merge.merge([one, two], out, method.Method('ties', (1.0, 1.0)), rank=64)",
        "merge.merge([one, two], out, method.Method('dare-sum', (1.0, 1.0)), rank=64)",
        "merge_into.merge_into([one, two], model, out.with_name('m'), method.Method('concat', (1.0, 1.0)))",
        "merge_into.merge_into([one], model, out.with_name('m'), method.Method('concat', (1.0,)));"
        "extract.extract(str(out.with_name('m')), model, out, lowrank.Rule(rank=64))",
    ],
)
def test_memory_stays_below_the_largest_file(code, large, tmp_path):
    one, two = large / "0.safetensors", large / "1.safetensors"
    model = large / "model"
    arguments = [str(path) for path in (model, one, two, tmp_path / "out.safetensors")]
    script = MEASURED.replace("{code}", code)
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout.splitlines()[-1])
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    read = [one, *(model.rglob("*.safetensors") if "model" in code else ())]
    largest = max(path.stat().st_size for path in (*read, *written))
    print(f"{code.split('(')[0]}: {peak / 1e6:.0f} MB beside a file of {largest / 1e6:.0f} MB")
    assert peak < 1.5 * largest
