"""Loss and gradients asked for in the middle of an optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from pathkernel.errors import InputError

Closure: TypeAlias = Callable[[], Any]
"""Clears the gradients, computes the loss of the batch at the parameters' present values, calls its ``backward`` and
returns it."""


def evaluated(closure: Closure | None) -> Any:
    """Value of the closure, after it has put the gradients in place; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def required(closure: Closure | None, method: Any) -> Closure:
    """The closure of a method that cannot step without one.

    Raises
    ------
    InputError
        Where there is none.
    """
    if closure is None:
        raise InputError(
            f"`{type(method).__name__}.step()` was called without a closure",
            "This method evaluates loss and gradients in the middle of its step",
            "Write `optimizer.step(closure)`, where `closure` clears the gradients, computes the loss, calls "
            "`loss.backward()` and returns the loss",
        )
    return closure


def received(optimizer: Optimizer) -> Iterator[tuple[Tensor, Tensor, dict[str, Any], dict[str, Any]]]:
    """(θ, g, state, settings) of every parameter that has a gradient."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                yield p, p.grad, optimizer.state[p], group
