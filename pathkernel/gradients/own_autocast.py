"""Autocast that was put around the ``forward`` of one module, as frameworks prepare a network for mixed precision."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def own_autocast(module: nn.Module) -> tuple[str, torch.dtype] | None:
    """Kind of device and floating type of the autocast that stands around a module's own ``forward``, or None.

    A method that a class was written with is not looked at: its autocast is part of the network.
    """
    forward = vars(module).get("forward")
    found = None if forward is None else _opened(forward)
    return None if found is None else (found[0].device, found[0].fast_dtype)


def without_autocast(module: nn.Module) -> Callable[..., Any] | None:
    """The part of a module's own ``forward`` inside its autocast; None where there is no autocast.

    What stands around it, such as the conversion of the outputs to float32, is left out as well.
    """
    forward = vars(module).get("forward")
    found = None if forward is None else _opened(forward)
    if found is None:
        return None
    inside = found[1]
    return types.MethodType(inside, module) if isinstance(inside, types.FunctionType) else inside


def _opened(forward: Callable[..., Any]) -> tuple[torch.autocast, Callable[..., Any]] | None:
    """The autocast that a function is decorated with, and what it decorates."""
    met: set[int] = set()
    while id(forward) not in met:
        met.add(id(forward))
        forward = getattr(forward, "__func__", forward)
        inside = getattr(forward, "__wrapped__", None)
        contents = [_content(cell) for cell in getattr(forward, "__closure__", None) or ()]
        found = [one for one in contents if isinstance(one, torch.autocast) and one._enabled]
        if found and inside is not None:
            return found[0], inside
        forward = forward if inside is None else inside
    return None


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing has been assigned to it yet
        return None
