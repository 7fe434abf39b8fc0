"""Filters of the parameters that make up θ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn

from pathkernel._typing import Parameters
from pathkernel.errors import InputError, ModelMismatchError, quoted
from pathkernel.gradients.parameters import named_trainable

ParameterFilter: TypeAlias = str | Sequence[str] | Callable[[str, nn.Parameter], bool]
"""A name or glob, several of them, or a function of name and parameter."""


def chosen_parameters(model: nn.Module, parameters: Parameters | ParameterFilter | None) -> Parameters:
    """The parameters that make up θ, checked against the model's.

    Parameters
    ----------
    model
        The network.
    parameters
        Values by name, taken as they are; a filter, which chooses among the trainable ones; or None for all of those.
    """
    chosen = parameters if isinstance(parameters, Mapping) else _filtered(model, parameters)
    own = dict(model.named_parameters())
    wrong = [
        f"`{name}` {tuple(p.shape)}" for name, p in chosen.items() if name not in own or own[name].shape != p.shape
    ]
    if wrong:
        raise ModelMismatchError(
            f"`parameters` holds {', '.join(wrong)}",
            "Names and shapes must be those of `model.named_parameters()`",
            "Pass `parameters=trajectory.parameters(s)` of this very model",
        )
    if not chosen:
        raise InputError(
            "The model has no trainable parameters",
            "A tangent kernel is made of gradients in the parameters",
            "Set `requires_grad_(True)` on some, or name them in `parameters`",
        )
    return chosen


def _filtered(model: nn.Module, parameters: ParameterFilter | None) -> Parameters:
    trainable = named_trainable(model)
    if parameters is None:
        return trainable
    if callable(parameters):
        chosen = {name: p for name, p in trainable.items() if parameters(name, p)}
        if trainable and not chosen:
            raise InputError(
                f"`parameters` said no to each of {len(trainable)} trainable parameters",
                "At least one parameter must make up θ",
                f"Return True for some, such as {next(iter(trainable))!r}",
            )
        return chosen
    patterns: list[Any]
    try:
        patterns = [parameters] if isinstance(parameters, str) else list(parameters)
    except TypeError:  # nothing that has parts
        patterns = [parameters]
    if not all(isinstance(one, str) for one in patterns):
        raise InputError(
            f"`parameters={quoted(parameters)}` was given",
            "It is a name or a glob, a list of them, a function of name and parameter, or values by name",
            'Write for example `parameters="*.weight"`, or leave it out for all trainable ones',
        )
    matched = {pattern: [name for name in trainable if fnmatchcase(name, pattern)] for pattern in patterns}
    empty = [pattern for pattern, names in matched.items() if not names]
    if empty or not patterns:
        raise InputError(
            f"`parameters` has {', '.join(map(repr, empty)) or 'no pattern'}, which matches no trainable parameter"
            + _frozen_matches(model, trainable.keys(), empty),
            f"Names are those of `model.named_parameters()`: {', '.join(list(trainable)[:4])}, …",
            f'Write for example `parameters={next(iter(trainable), "*")!r}`, or a glob such as "*.weight"',
        )
    wanted = {name for names in matched.values() for name in names}
    return {name: p for name, p in trainable.items() if name in wanted}


def _frozen_matches(model: nn.Module, trainable: object, patterns: Sequence[str]) -> str:
    assert hasattr(trainable, "__contains__")
    frozen = [
        name
        for name, _ in model.named_parameters()
        if name not in trainable and any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    return f" (only frozen ones: {', '.join(frozen[:4])})" if frozen else ""
