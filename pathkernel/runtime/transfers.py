"""Numbers that lie on a device, read on the host in one transfer.

Whoever reads a number from an accelerator waits until all work that was given to it is done, and it stands idle
afterwards until new work arrives. So what a step needs to know on the host is worked out there in full, and read once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_the_host(values: Sequence[int | Tensor]) -> list[int | Tensor]:
    """Integers as they are, and vectors of int64 as copies on the CPU, (n,) each; copied in one transfer."""
    vectors = [value for value in values if isinstance(value, Tensor)]
    if not vectors:
        return list(values)
    copies = iter(torch.cat(vectors).cpu().split([len(vector) for vector in vectors]))
    return [next(copies) if isinstance(value, Tensor) else value for value in values]


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
