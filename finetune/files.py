"""Files that are whole or absent: written under a temporary name, flushed to the disk, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL = ".partial-"
DTYPES: Mapping[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
}
"""Types of numbers in safetensors files -> torch's names, in the order in which the format's library aligns them."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes ``path``'s name, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{PARTIAL}{uuid.uuid4().hex[:8]}-{path.name}"
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success it becomes ``path``, which must not hold another by then.

    An old folder at ``path`` is moved aside first and removed last, so that one of the two is always whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{PARTIAL}{uuid.uuid4().hex[:8]}-{path.name}"
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            _flush(file)
        old = path.parent / f"{PARTIAL}{uuid.uuid4().hex[:8]}-old-{path.name}"
        if path.exists():
            path.replace(old)
        temporary.replace(path)
        _flush(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; equal content gives equal bytes.

    Tensors may live anywhere and need not be contiguous.
    """
    from safetensors.torch import save_file

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        temporary.touch()
        # the library has temporary names of its own, which a killed writer would leave, and files for its owner alone
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=path.parent) as folder:
            written = Path(folder) / "tensors"
            save_file(whole, written, metadata={"format": "pt", **(metadata or {})})
            written.chmod(temporary.stat().st_mode)
            written.replace(temporary)
        _sort_metadata(temporary)


def stream_tensors(
    path: Path, blanks: Mapping[str, Tensor], read: Callable[[str], Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """As ``write_tensors``, with one tensor in memory at a time: what the library cannot do.

    Args:
        blanks: a tensor of every name with its dtype and shape, most easily on the meta device.
        read: gives the tensor of a name.
    """
    codes = {f"torch.{name}": code for code, name in DTYPES.items()}
    entries = {
        name: (codes[str(blank.dtype)], list(blank.shape), blank.numel() * blank.element_size())
        for name, blank in blanks.items()
    }
    header, names = tensors_header(entries, metadata)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        for name in names:
            tensor = read(name).detach().cpu()
            if (tensor.dtype, tensor.shape) != (blanks[name].dtype, blanks[name].shape):
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not what was promised")
            file.write(tensor_bytes(tensor))


def tensors_header(
    entries: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[str]]:
    """What stands before the tensors in a safetensors file, and their order: wider types first, so all are aligned.

    Args:
        entries: by name, the dtype as ``DTYPES`` calls it, the shape, and how many bytes there are.
    """
    widths = {code: place for place, code in enumerate(DTYPES)}
    names = sorted(entries, key=lambda name: (-widths[entries[name][0]], name))
    header: dict[str, Any] = {"__metadata__": dict(sorted({"format": "pt", **(metadata or {})}.items()))}
    end = 0
    for name in names:
        code, shape, size = entries[name]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    return header_bytes(header), names


def header_bytes(header: Mapping[str, Any]) -> bytes:
    """How a safetensors file begins: its header's length, and the header, filled up so that tensors are aligned."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(tensor: Tensor) -> Any:
    """A tensor on the CPU as the format has it."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def model_cache() -> Path:
    """Where models are kept that the toolkit has put together, beside the hub's; all may be removed at any time."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "finetune" / "models"


def remove_partial(folder: Path) -> None:
    """Remove what interrupted writers left in ``folder`` (not below it). Only for folders that one run owns."""
    if not folder.is_dir():
        return
    for leftover in folder.iterdir():
        if leftover.name.startswith(PARTIAL):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _sort_metadata(path: Path) -> None:
    """Put the header's metadata in order in place: the library writes it in another order every time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= size:
            file.seek(8)
            file.write(ordered.ljust(size))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
