"""Numbers that lie on a device, read on the host in one transfer; and those that are sent there without waiting.

Whoever reads a number from an accelerator waits until all work that was given to it is done, and it stands idle
afterwards until new work arrives. So what a step needs to know on the host is worked out there in full, and read once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pathkernel.runtime.workspace import Workspace

TAKES_AT_ONCE = ("cuda", "meta")
"""Kinds of devices that have a copy of ordinary memory by when a call returns that does not wait: CUDA lays one aside,
and nothing is read for tensors without numbers."""


def on_the_host(values: Sequence[int | Tensor]) -> list[int | Tensor]:
    """Integers as they are, and vectors of int64 as copies on the CPU, (n,) each; copied in one transfer."""
    vectors = [value for value in values if isinstance(value, Tensor)]
    if not vectors:
        return list(values)
    copies = iter(torch.cat(vectors).cpu().split([len(vector) for vector in vectors]))
    return [next(copies) if isinstance(value, Tensor) else value for value in values]


def sent(values: Tensor, device: torch.device) -> Tensor:
    """The same numbers on another device, (...); where that is a GPU nobody waits for them."""
    if values.device == device:
        return values
    # Page-locked memory is read later, and may be written on by then. On the way back nothing would tell when the
    # numbers are there.
    at_once = device.type in TAKES_AT_ONCE and values.is_cpu and not values.is_pinned()
    return values.to(device, non_blocking=at_once)


def received(values: Tensor, memory: Workspace | None) -> np.ndarray:
    """A large result as an array of numpy: the tensor's own numbers on the CPU, else a copy in memory used again.

    What memory costs that a process touches for the first time, `Workspace` tells.
    """
    if values.is_cpu or memory is None:
        found: np.ndarray = values.cpu().numpy()
        return found
    # In the order in which the numbers lie, they come in one transfer.
    order = sorted(range(values.dim()), key=values.stride, reverse=True)
    lying = values.permute(order)
    into = memory.empty(tuple(lying.shape), lying.dtype)
    into.copy_(lying)
    copied: np.ndarray = into.permute([order.index(axis) for axis in range(values.dim())]).numpy()
    return copied


def numbers(values: Sequence[Tensor]) -> list[float]:
    """Numbers of tensors with one entry each, as float64.

    Parameters
    ----------
    values
        On one device or on the CPU, in any mixture: floating-point numbers, integers below 2^53, truth values.

    Returns
    -------
    list of float
        In their order. One host synchronisation for all that lie off the CPU.
    """
    away = [place for place, value in enumerate(values) if not value.is_cpu]
    found = [value.item() if value.is_cpu else 0.0 for value in values]
    if away:
        read = torch.stack([values[place].detach().reshape(()).double() for place in away]).tolist()
        for place, number in zip(away, read, strict=True):
            found[place] = number
    return [float(number) for number in found]
