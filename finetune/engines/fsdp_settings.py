"""How a run under FSDP2 begins: what the launcher was told, and what of it is done here."""

from __future__ import annotations

import os
from dataclasses import dataclass

from finetune.config.schema import TrainConfig
from finetune.engines.pieces import require_divisible
from finetune.errors import UserError

_ASKED = "ACCELERATE_USE_FSDP"
_KEYS = {  # of a profile, where a variable is not called like it
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "fsdp_transformer_layer_cls_to_wrap",
    "ACCELERATE_DYNAMO_BACKEND": "dynamo_backend",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}
_REFUSED = {  # variable of accelerate's -> the values that change nothing, and what to do about others
    "FSDP_AUTO_WRAP_POLICY": (("NO_WRAP",), "weights are dealt out block by block, whatever the model; take it out"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ((), "weights are dealt out block by block, whatever the model; take it out"),
    "FSDP_IGNORED_MODULES": ((), "all of the denoiser and of what trains is dealt out; take it out"),
    "FSDP_STATE_DICT_TYPE": ((), "checkpoints hold whole tensors, which every profile reads; take it out"),
    "FSDP_SHARDING_STRATEGY": (("FULL_SHARD",), "FSDP2 has fsdp_reshard_after_forward instead; take it out"),
    "FSDP_BACKWARD_PREFETCH": (("NO_PREFETCH",), "FSDP2 has no such setting; take it out"),
    "FSDP_FORWARD_PREFETCH": (("false",), "FSDP2 has no such setting; take it out"),
    "FSDP_ACTIVATION_CHECKPOINTING": (("false",), "it is the recipe's to say, as train.gradient_checkpointing"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (("false",), "it is not done here; write false"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (("false",), "every process loads the networks, which are then cut; write false"),
    "ACCELERATE_DYNAMO_BACKEND": (("NO",), "networks are not compiled with FSDP2; take it out"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (("false",), "weights are cut over all processes; take it out"),
}


@dataclass(frozen=True)
class FsdpSettings:
    """What is up to the launch profile.

    Attributes:
        reshard: let go of a block's weights after its forward pass, and gather them again for the backward pass.
        offload: weights, gradients and the optimizer's memory lie on the host.
    """

    reshard: bool = True
    offload: bool = False


def asked() -> bool:
    """Whether the launcher was told to use FSDP."""
    return os.environ.get(_ASKED, "false").lower() == "true"


def settings(train: TrainConfig) -> FsdpSettings:
    """What the launcher was told.

    Raises:
        UserError: it was told what is not done here, or what contradicts the recipe.
    """
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(f"fsdp_version is {version}, expected 2: FSDP1 is not trained with here")
    for name, (allowed, why) in _REFUSED.items():
        if (said := os.environ.get(name)) is not None and said not in allowed:
            raise UserError(f"{_KEYS.get(name, name.lower())}: {said} does not work here: {why}")
    require_divisible(train, "FSDP2")
    return FsdpSettings(_flag("FSDP_RESHARD_AFTER_FORWARD", "true"), _flag("FSDP_OFFLOAD_PARAMS", "false"))


def _flag(name: str, default: str) -> bool:
    said = os.environ.get(name, default).lower()
    if said not in ("true", "false"):
        raise UserError(f"{name.lower()}: {said} does not work here: with FSDP2 it is true or false")
    return said == "true"
