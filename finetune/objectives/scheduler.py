"""What a base was trained on, as its scheduler of diffusers says it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.objectives.ddpm import DDPM
from finetune.objectives.edm import EDM
from finetune.objectives.flow import Flow
from finetune.objectives.process import Process
from finetune.objectives.shifts import Dynamic, Shift, static, unshifted


def process_of(scheduler: Any, where: Path, *, unit: float = 1000.0, patch: int = 2) -> Process:
    """The process that ``scheduler`` undoes.

    Args:
        scheduler: of diffusers, as it was loaded.
        where: its folder; errors quote it.
        unit, patch: as in ``finetune.objectives.flow.Flow``, which a scheduler does not say.

    Raises:
        UserError: no process is known for it, or it contradicts its prediction.
    """
    settings, name = scheduler.config, type(scheduler).__name__
    prediction = settings.get("prediction_type")
    if name.startswith("FlowMatch") or prediction == "flow_prediction":
        return Flow(unit, patch, _shift(settings, where, patch), settings["num_train_timesteps"])
    known = ("epsilon", "v_prediction", "sample")
    if "sigma_data" in settings and prediction in known[:2]:
        return EDM(settings["sigma_data"], settings["sigma_min"], settings["sigma_max"], prediction)
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None or prediction not in known:
        raise UserError(f"{where}: {name} with prediction {prediction!r} is unknown")
    # some samplers replace the zero by a tiny number, so the table alone does not tell
    if prediction == "epsilon" and settings.get("rescale_betas_zero_snr"):
        raise UserError(
            f"{where}: epsilon prediction cannot be trained with zero terminal SNR; "
            "the model needs prediction_type v_prediction"
        )
    return DDPM(table.float(), prediction)


def _shift(settings: Any, where: Path, patch: int) -> Shift:
    if settings.get("use_dynamic_shifting"):
        if settings.get("time_shift_type", "exponential") != "exponential":
            raise UserError(f"{where}: time_shift_type {settings['time_shift_type']!r} is unknown; known: exponential")
        names = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
        return Dynamic(**{name: settings[name] for name in names}, patch=patch)
    factor = settings.get("shift", settings.get("flow_shift", 1.0))
    return unshifted if factor == 1.0 else partial(static, factor=factor)
