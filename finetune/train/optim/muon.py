"""Muon for matrices and AdamW for everything else, as one optimizer; the arithmetic of both is torch's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from finetune.errors import UserError

KINDS = ("matrices", "others")


class MuonWithAdamW(Optimizer):
    """Each group says under ``kind`` whether it holds ``matrices`` or ``others``.

    A matrix [n, m] moves by its orthogonalised momentum (Jordan et al. 2024), scaled by 0.2 √max(n, m), so that the
    root mean square of a step is that of AdamW's and one learning rate fits both (Liu et al. 2025, "Muon is Scalable
    for LLM Training", eq. 4).

    Args:
        params: groups.
        lr: learning rate of both.
        weight_decay: of both, decoupled.
        matrices: further arguments of ``torch.optim.Muon``.
        others: further arguments of ``torch.optim.AdamW``.

    Raises:
        UserError: this torch has no Muon.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float,
        matrices: Mapping[str, Any],
        others: Mapping[str, Any],
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"train.optimizer.name: muon needs torch 2.9 or later, this is {torch.__version__}")
        shared: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(params, shared)
        makers = {
            "matrices": lambda groups: torch.optim.Muon(groups, **shared, **matrices, adjust_lr_fn="match_rms_adamw"),
            "others": lambda groups: torch.optim.AdamW(groups, **shared, **others),
        }
        self._parts = {kind: makers[kind](groups) for kind in KINDS if (groups := self._of(kind))}
        for part in self._parts.values():
            self.defaults |= part.defaults  # what a group says beside these has been changed by a step

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move what has a gradient."""
        for kind, part in self._parts.items():
            # groups and memory are this optimizer's, which is the one that schedules and checkpoints know
            part.param_groups, part.state = self._of(kind), self.state
            part.step()

    def _of(self, kind: str) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["kind"] == kind]
