"""Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685) and its variants, through PEFT.

A layer ``W x`` becomes ``W x + s B A x`` with ``s = alpha / rank``, or ``alpha / sqrt(rank)`` where ranks are
stabilised (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732). For a k x k convolution ``A`` is one like it with
``rank`` outputs and ``B`` is 1 x 1.

DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353) trains the length ``m`` of each row of the weight apart:
``W' = m (W + s B A) / ||W + s B A||``, the norm over inputs and kernel, and no gradient through it (section 4.3).
LoRA+ (Hayou et al. 2024, https://arxiv.org/abs/2402.12354) lets ``B``, and here ``m``, learn faster than ``A``.
PiSSA is in ``finetune.adapters.pissa``. Rank dropout and the bound on norms are those of kohya's tools.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from finetune.adapter import ParameterGroup, Weights
from finetune.adapters.inject import NAME, Injected, as_settings, exactly
from finetune.adapters.pissa import Principal, split
from finetune.adapters.select import check_same, ranks_of
from finetune.config.adapters import LoraConfig
from finetune.errors import UserError
from finetune.family import ModelFamily

MAGNITUDE = "lora_magnitude_vector"
HALVES = ("lora_A", "lora_B")


class Lora(Injected):
    """Low-rank factors in a family's networks, which are frozen otherwise.

    Factors are float32 whatever the base is. ``B`` is zero at first, so nothing changes until something is learned;
    with ``init: pissa`` the sum of base and change is the untouched weight but for rounding.

    Raises:
        UserError: a target or a pattern of ``ranks`` matches no linear or convolution layer; a rank is larger than
            its layer.
    """

    kind: ClassVar[str] = "lora"

    def __init__(self, config: LoraConfig, family: ModelFamily, seed: int) -> None:
        self.config = config
        self._ranks: dict[str, int] = {}
        self._principal: dict[str, Principal] = {}
        self._shared = False
        self.bounded = config.max_norm is not None
        super().__init__(config, family, seed)

    def _prepare(self, chosen: Mapping[str, nn.Module]) -> None:
        self._ranks = ranks_of(chosen, self.config.rank, self.config.ranks)

    def _described(self, network: str, names: Sequence[str]) -> peft.LoraConfig:
        other = [name for name in names if self._ranks[f"{network}.{name}"] != self.config.rank]
        return peft.LoraConfig(
            r=self.config.rank,
            lora_alpha=self._alpha(self.config.rank),
            rank_pattern={f"^{re.escape(name)}": self._ranks[f"{network}.{name}"] for name in other},
            alpha_pattern={f"^{re.escape(name)}": self._alpha(self._ranks[f"{network}.{name}"]) for name in other},
            lora_dropout=self.config.dropout,
            use_rslora=self.config.use_rslora,
            use_dora=self.config.use_dora,
            target_modules=exactly(names),
        )

    @torch.no_grad()
    def _initialise(self, name: str, layer: LoraLayer, rng: torch.Generator) -> None:
        down, up = (getattr(layer, half)[NAME].float() for half in HALVES)
        if self.config.use_dora:
            layer.lora_magnitude_vector[NAME].float()
        if self.config.rank_dropout:
            down.register_forward_hook(self._drop_ranks)
        if self.config.init == "pissa":
            base: Any = layer.get_base_layer()
            found = self._principal[name] = split(name, base.weight, self._ranks[name], layer.scaling[NAME])
            down.weight.copy_(found.down)
            up.weight.copy_(found.up)
            return
        drawn = torch.empty(down.weight.shape)
        if self.config.init == "gaussian":
            drawn.normal_(std=1 / self._ranks[name], generator=rng)
        else:  # Kaiming with a = sqrt(5), the rule of nn.Linear
            bound = 1 / math.sqrt(down.weight[0].numel())
            drawn.uniform_(-bound, bound, generator=rng)
        down.weight.copy_(drawn)
        up.weight.zero_()

    def _drop_ranks(self, down: nn.Module, _: tuple[Tensor, ...], inner: Tensor) -> Tensor | None:
        """Leave out some of the ranks of each sample; the others count as much more."""
        if not (self._dropping and down.training):
            return None
        ranks = 1 if isinstance(down, nn.Conv2d) else inner.ndim - 1
        shape = [size if axis in (0, ranks) else 1 for axis, size in enumerate(inner.shape)]
        kept = torch.rand(shape, device=inner.device) >= self.config.rank_dropout
        return inner * kept / (1 - self.config.rank_dropout)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Factors and magnitudes, layer by layer."""
        parts = (*HALVES, MAGNITUDE) if self.config.use_dora else HALVES
        return {
            f"{name}.{part}.weight": getattr(layer, part)[NAME].weight
            for name, layer in self.layers.items()
            for part in parts
        }

    def groups(self) -> list[ParameterGroup]:
        """Of each network its factors, with LoRA+ those that learn faster apart, and the magnitudes of DoRA.

        Weight decay draws to the base, where the change is zero; it does not act on lengths, nor with PiSSA, where
        zero is the residual.
        """
        ratio = self.config.lora_plus_ratio or 1.0
        decays = self.config.init != "pissa"
        groups = []
        for network, found in self.by_network().items():
            fast = {name: one for name, one in found.items() if self.config.lora_plus_ratio and ".lora_B." in name}
            lengths = {name: one for name, one in found.items() if f".{MAGNITUDE}." in name}
            slow = {name: one for name, one in found.items() if name not in fast and name not in lengths}
            rate = self.rate(network)
            groups += [ParameterGroup(network, slow, rate, decays=decays)]
            groups += [ParameterGroup(f"{network}_fast", fast, rate, ratio, decays)] if fast else []
            groups += [ParameterGroup(f"{network}_magnitude", lengths, rate, ratio, False)] if lengths else []
        return groups

    def weights(self) -> Weights:
        """Factors, effective alphas and magnitudes: the change of a weight is ``alpha / rank * B A``, to which DoRA's
        lengths are then given. With PiSSA factors of twice the rank, for the untouched base.
        """
        tensors = {name: parameter.detach().cpu().clone() for name, parameter in self.parameters().items()}
        for name, found in self._principal.items():
            down, up = (f"{name}.{half}.weight" for half in HALVES)
            tensors[down], tensors[up] = found.difference(tensors[down], tensors[up])
        tensors |= {f"{name}.alpha": torch.tensor(alpha) for name, alpha in self._alphas().items()}
        alpha = self._alpha(self.config.rank)
        return Weights(self.kind, tensors, as_settings(self.config, alpha=alpha))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put ``weights().tensors`` back, bit for bit.

        Raises:
            UserError: a tensor is missing, unknown or of another shape, an alpha is another, or PiSSA began at
                another base.
        """
        check_same(self.weights().tensors, tensors)
        for name, alpha in self._alphas().items():
            found = float(tensors[f"{name}.alpha"])
            if found != float(torch.tensor(alpha)):
                raise UserError(f"{name}: alpha is {found:g}, this adapter has {alpha:g}")
        loaded = dict(tensors)
        for name, principal in self._principal.items():
            down, up = (f"{name}.{half}.weight" for half in HALVES)
            loaded[down], loaded[up] = principal.without(name, loaded[down].cpu(), loaded[up].cpu())
        for name, parameter in self.parameters().items():
            parameter.copy_(loaded[name])

    def share_networks(self) -> None:
        """From here on PiSSA can't put the base's weights back for a time."""
        self._shared = True

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, every layer answers as its base does: bit-equal to the untouched network.

        Raises:
            UserError: PiSSA has changed a base that processes hold in pieces.
        """
        if self._shared and self._principal:
            raise UserError(
                "prior.kind: 'model' with adapter.init: pissa does not work where processes hold the networks in "
                "pieces (ZeRO-3, FSDP2); take images, or zero2"
            )
        with super().disabled(), self._residual(0.0):
            yield

    def set_aside(self) -> Mapping[str, Tensor]:
        """What PiSSA's residuals stand in place of."""
        return {f"{name}.weight": found.original for name, found in self._principal.items()}

    @contextmanager
    def scaled(self, strength: float) -> Iterator[None]:
        """Inside, every change counts ``strength`` times: 0 is the base, 1 what was trained.

        Of DoRA only the direction does, as in diffusers; lengths stay what was trained.
        """
        trained = {name: layer.scaling[NAME] for name, layer in self.layers.items()}
        for layer in self.layers.values():
            layer.scaling[NAME] *= strength
        try:
            with self._residual(strength):
                yield
        finally:
            for name, layer in self.layers.items():
                layer.scaling[NAME] = trained[name]

    @contextmanager
    def _residual(self, share: float) -> Iterator[None]:
        """Inside, so much of PiSSA's residual is in place of the base's weights."""
        for found in self._principal.values():
            found.put(share)
        try:
            yield
        finally:
            for found in self._principal.values():
                found.put(1.0)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Inside, changes are part of the base weights, which is faster; afterwards these are bit-equal to before.

        For inference only. Weights are put back from a copy: to subtract what was added would not be exact.
        """
        with ExitStack() as stack, torch.no_grad():
            for layer in self.layers.values():
                weight = layer.get_base_layer().weight
                stack.callback(weight.copy_, weight.detach().clone())
                layer.merge()
                stack.callback(layer.unmerge)
            yield

    @torch.no_grad()
    def end_step(self, rates: Mapping[str, float]) -> None:
        """Scale factors down whose change ``n = ||s B A||`` is longer than ``max_norm``, each by ``sqrt(max / n)``."""
        longest = self.config.max_norm
        if longest is None:
            return
        for layer in self.layers.values():
            down, up = (getattr(layer, half)[NAME].weight for half in HALVES)
            norm = max(layer.scaling[NAME] * float(_norm_of_product(up, down)), longest / 2)
            ratio = min(norm, longest) / norm
            if ratio < 1.0:
                down *= math.sqrt(ratio)
                up *= math.sqrt(ratio)

    def bytes_beside(self) -> int:
        """With PiSSA what every layer was, and what its factors began as."""
        kept = (part for one in self._principal.values() for part in (one.original, one.down, one.up))
        return sum(part.nbytes for part in kept)

    def _alpha(self, rank: int) -> float:
        """Alpha of a layer of some rank, so that ``alpha / rank`` is the same for all."""
        alpha = self.config.alpha or float(self.config.rank)
        return alpha if rank == self.config.rank else alpha * rank / self.config.rank

    def _alphas(self) -> dict[str, float]:
        """Effective alphas of the layers as they are exported: the rule of scaling is folded in."""
        found = {}
        for name, rank in self._ranks.items():
            alpha = self._alpha(rank) * (math.sqrt(rank) if self.config.use_rslora else 1.0)
            found[name] = alpha * (2 if name in self._principal else 1)  # its factors have twice the rank
        return found


def _norm_of_product(up: Tensor, down: Tensor) -> Tensor:
    """``||B A||`` (Frobenius) without the product, which is as large as the weight: ``tr(B^T B A A^T)``, its root."""
    b, a = up.flatten(1).double(), down.flatten(1).double()
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()
