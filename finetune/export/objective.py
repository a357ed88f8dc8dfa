"""What headers say of the objective, where a recipe refines it."""

from __future__ import annotations

import json

from finetune.config.objective import (
    DebiasedWeighting,
    MinSnrWeighting,
    NoiseConfig,
    ObjectiveConfig,
    PseudoHuberLoss,
    SmoothL1Loss,
    WeightingConfig,
)


def refinements(config: ObjectiveConfig) -> str:
    """The keys that are not at their defaults, as JSON; empty where there are none."""
    found = config.model_dump(mode="json", exclude_defaults=True)
    return json.dumps(found, sort_keys=True) if found else ""


def kohya(config: ObjectiveConfig) -> dict[str, str]:
    """The same as far as the fields of kohya's trainers say it."""
    fields = _weighting(config.weighting) | _noise(config.noise)
    if config.zero_terminal_snr:
        fields["ss_zero_terminal_snr"] = "True"
    if isinstance(config.loss, PseudoHuberLoss | SmoothL1Loss):
        fields["ss_loss_type"] = "huber" if isinstance(config.loss, PseudoHuberLoss) else "smooth_l1"
        fields["ss_huber_schedule"], fields["ss_huber_c"] = config.loss.schedule, str(config.loss.delta)
    return fields


def _weighting(config: WeightingConfig) -> dict[str, str]:
    match config:
        case MinSnrWeighting(gamma=gamma):
            return {"ss_min_snr_gamma": str(gamma)}
        case DebiasedWeighting():
            return {"ss_debiased_estimation": "True"}
    return {}


def _noise(config: NoiseConfig) -> dict[str, str]:
    fields = {}
    if config.offset:
        fields["ss_noise_offset"] = str(config.offset)
    if config.perturbation:
        fields["ss_ip_noise_gamma"] = str(config.perturbation)
    if config.pyramid:
        fields["ss_multires_noise_iterations"] = str(config.pyramid.levels)
        fields["ss_multires_noise_discount"] = str(config.pyramid.discount)
    return fields
