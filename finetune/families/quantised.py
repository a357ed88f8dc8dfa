"""Linear layers whose frozen weights lie in memory in 8 or 4 bits and are unpacked whenever they are used.

All three formats divide a group of weights by a scale so that the largest fits; they differ in what is rounded to:

- ``int8``: 255 even steps, a scale for each row (as Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, do for
  vectors; weights alone, and no outliers kept apart).
- ``fp8``: e4m3 (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433), a scale for each row.
- ``nf4``: 16 quantiles of a normal distribution, a scale for 64 weights (Dettmers et al. 2023,
  https://arxiv.org/abs/2305.14314, section 3 and appendix E; scales are kept in float32).

They are plain torch and run on every device. What a layer computes is what a float layer with the unpacked weight
would.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 64  # weights that share a scale in NF4

# Appendix E of the paper on QLoRA.
_NORMAL = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)  # fmt: skip


class Format(ABC):
    """How a weight [out, in] is packed: codes and scales, both tensors on its device."""

    @abstractmethod
    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and float32 scales of a float32 weight."""

    @abstractmethod
    def unpack(self, codes: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
        """The weight again, float32 ``shape``."""


class _Rows(Format):
    """A number a weight, and a scale a row."""

    dtype: ClassVar[torch.dtype]
    largest: ClassVar[float]

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [out, in], scales [out, 1]."""
        scale = _nonzero(weight.abs().amax(1, keepdim=True)) / self.largest
        return self._rounded(weight / scale), scale

    def unpack(self, codes: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
        """Their product."""
        return codes.float() * scale

    def _rounded(self, numbers: Tensor) -> Tensor:
        return numbers.to(self.dtype)


class Int8(_Rows):
    """From -127 to 127."""

    dtype, largest = torch.int8, 127.0

    def _rounded(self, numbers: Tensor) -> Tensor:
        return numbers.round().to(self.dtype)


class Fp8(_Rows):
    """e4m3, whose largest number is 448."""

    dtype, largest = torch.float8_e4m3fn, 448.0


class Nf4(Format):
    """Two weights a byte, the first in its upper half, row by row."""

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes uint8 [blocks * 32], scales [blocks, 1]; the last block is filled with zeros."""
        blocks = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
        scale = _nonzero(blocks.abs().amax(1, keepdim=True))
        levels = torch.tensor(_NORMAL, device=weight.device)
        middles = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(blocks / scale, middles, out_int32=True).to(torch.uint8).view(-1, 2)
        return codes[:, 0] * 16 + codes[:, 1], scale

    def unpack(self, codes: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
        """Both levels of each byte at once, from a table of 256."""
        levels = torch.tensor(_NORMAL, device=codes.device)
        pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1)  # of each byte
        blocks = F.embedding(codes.int(), pairs).view(-1, BLOCK) * scale
        return blocks.flatten()[: shape.numel()].view(shape)


FORMATS: Mapping[str, Format] = {"int8": Int8(), "fp8": Fp8(), "nf4": Nf4()}


class QuantisedLinear(nn.Linear):
    """Takes the place of a frozen ``nn.Linear``; ``bias`` is the old one's.

    Attributes:
        codes: the packed weight. scale: float32. Both are parameters without gradient and not buffers, which processes
            would send each other in every step.
        dtype: of ``weight``.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, format: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.format, self.dtype = FORMATS[format], linear.weight.dtype
        codes, scale = self.format.pack(linear.weight.detach().float())
        self.codes, self.scale = (nn.Parameter(part, requires_grad=False) for part in (codes, scale))
        self.bias = linear.bias
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """An unpacked copy of the weight; what is written into it is lost."""
        return self.unpacked(self.codes, self.scale, self.dtype)

    def unpacked(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight, made of ``codes`` and ``scale``."""
        return self.format.unpack(codes, scale, torch.Size((self.out_features, self.in_features))).to(dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """``W x + b`` in the dtype of ``inputs``."""
        answer: Tensor = _Linear.apply(inputs, self.codes, self.scale, self)
        return answer


class _Linear(torch.autograd.Function):
    """Keeps the packed weight for the backward pass, and not the unpacked one, which would undo the saving."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, codes: Tensor, scale: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.layer = layer
        return F.linear(inputs, layer.unpacked(codes, scale, inputs.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale = ctx.saved_tensors
        (grad,) = grads
        return grad @ ctx.layer.unpacked(codes, scale, grad.dtype), None, None, None


@torch.no_grad()
def quantise(blocks: Mapping[str, nn.Module], format: str, skip: Sequence[str] = ()) -> None:
    """Replace the linear layers of ``blocks`` in place.

    Args:
        blocks: by their names in the network.
        skip: regular expressions; layers in whose names one is found stay as they are.
    """
    for path, block in blocks.items():
        for name, layer in list(_linears(block)):
            if any(re.search(pattern, f"{path}.{name}") for pattern in skip):
                continue
            parent, _, last = name.rpartition(".")
            setattr(block.get_submodule(parent), last, QuantisedLinear(layer, format))


def _linears(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in block.named_modules():
        if type(module) is nn.Linear:  # others may be read in ways of their own
            yield name, module


def _nonzero(scale: Tensor) -> Tensor:
    """Where all weights are 0, any scale will do."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
