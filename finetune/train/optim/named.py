"""Optimizer classes by their dotted path, with arguments that are checked against their signature."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from finetune.errors import UserError, nearest

KEY = "train.optimizer"
OURS = ("self", "params", "lr")  # given by the trainer


def find(path: str, options: Mapping[str, Any]) -> type[Optimizer]:
    """The class at ``path``, for example ``torch.optim.RAdam``, which takes ``options``.

    Raises:
        UserError: there is none, it is no optimizer that steps without a closure, or an option is no argument of it.
    """
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # what a package does while it is imported is its own affair
        raise UserError(f"{KEY}.name: {module_name} cannot be imported ({error}); is its package installed?") from None
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        known = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, Optimizer)]
        what = "is not there" if found is None else "is no torch.optim.Optimizer"
        raise UserError(f"{KEY}.name: {path} {what}{nearest(name, known)}")
    closure = inspect.signature(found.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(f"{KEY}.name: {path} computes the loss several times in a step, which the trainer does not do")
    known = [name for name in inspect.signature(found).parameters if name not in OURS]
    for key in options:
        if not takes(found, key):
            raise UserError(f"{KEY}.options.{key} is no argument{nearest(key, known)}; the class is {_shown(found)}")
    return found


def takes(found: type[Optimizer], argument: str) -> bool:
    """Whether ``found`` has ``argument``, or takes any."""
    named = inspect.signature(found).parameters
    return argument in named or any(one.kind is one.VAR_KEYWORD for one in named.values())


def make(found: type[Optimizer], groups: list[dict[str, Any]], lr: float, options: Mapping[str, Any]) -> Optimizer:
    """``found(groups, lr=lr, **options)``.

    Raises:
        UserError: ``found`` refuses the value of an option.
    """
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    if takes(found, "lr"):
        given["lr"] = lr
    try:
        return found(groups, **given)
    except (TypeError, ValueError, AssertionError) as error:
        said = f"{found.__name__} refuses them: {error}"
        raise UserError(f"{KEY}.options: {said}; the class is {_shown(found)}") from None


def _shown(found: type[Optimizer]) -> str:
    return f"{found.__name__}{inspect.signature(found).replace(return_annotation=inspect.Signature.empty)}"
