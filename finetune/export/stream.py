"""Safetensors files read and written tensor by tensor, so that memory does not grow with the file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finetune.errors import UserError
from finetune.files import DTYPES, PARTIAL, replacing, tensor_bytes, tensors_header

_DTYPES: Mapping[str, torch.dtype] = {code: getattr(torch, name) for code, name in DTYPES.items()}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def tensors(path: Path, keys: Iterable[str]) -> dict[str, Tensor]:
    """Copies of some tensors of a file, of which nothing stays mapped into memory.

    Raises:
        UserError: it is damaged or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key).clone() for key in keys}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: no whole safetensors file: {error}") from error


def tensors_of(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a file by its key, in the order of the keys; only the last one is in memory."""
    for key in shapes(path):
        yield key, tensors(path, [key])[key]


def shapes(path: Path) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Type and shape of every tensor of a file, by key; no tensor is read.

    Raises:
        UserError: it is damaged or something else, or holds numbers of a type that is not known.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in sorted(file.keys())}
            found = {key: (one.get_dtype(), one.get_shape()) for key, one in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: no whole safetensors file: {error}") from error
    for key, (code, _) in found.items():
        if code not in _DTYPES:
            raise UserError(f"{path}: {key} holds numbers of type {code}; known: {', '.join(DTYPES)}")
    return {key: (_DTYPES[code], shape) for key, (code, shape) in found.items()}


class Writer:
    """Takes the tensors of a file in any order. Equal content gives equal bytes.

    Attributes:
        metadata: of the header; may be filled until the end.
    """

    def __init__(self, spool: IO[bytes]) -> None:
        self.metadata: dict[str, str] = {}
        self._spool = spool
        self._entries: dict[str, tuple[str, list[int], int, int]] = {}  # code, shape, place in the spool, bytes

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, which may live anywhere and need not be contiguous.

        Raises:
            ValueError: a name is there already.
        """
        for name, tensor in tensors.items():
            if name in self._entries:
                raise ValueError(f"{name} is written twice")
            whole = tensor.detach().cpu()
            begin = self._spool.tell()
            self._spool.write(tensor_bytes(whole))
            size = self._spool.tell() - begin
            self._entries[name] = (_CODES[whole.dtype], list(whole.shape), begin, size)

    def finish(self, file: IO[bytes]) -> None:
        """Put header and tensors together."""
        entries = {name: (code, shape, size) for name, (code, shape, _, size) in self._entries.items()}
        header, names = tensors_header(entries, self.metadata)
        file.write(header)
        for name in names:
            _, _, begin, size = self._entries[name]
            self._spool.seek(begin)
            _copy(self._spool, file, size)


@contextmanager
def writing(path: Path) -> Iterator[Writer]:
    """A file that is written tensor by tensor, whole or not at all."""
    with (
        replacing(path) as temporary,
        tempfile.TemporaryDirectory(prefix=PARTIAL, dir=path.parent) as folder,
        (Path(folder) / "tensors").open("w+b") as spool,
    ):
        writer = Writer(spool)
        yield writer
        with temporary.open("wb") as file:
            writer.finish(file)


def require_new(path: Path) -> Path:
    """``path``, where there is nothing yet.

    Raises:
        UserError: there is.
    """
    if path.exists():
        raise UserError(f"{path}: is there already and is not overwritten; remove it or name another")
    return path


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    while size > 0:
        block = source.read(min(size, 1 << 20))
        target.write(block)
        size -= len(block)
