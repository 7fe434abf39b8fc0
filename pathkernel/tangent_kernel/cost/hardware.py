"""Speed of the machine at hand: four numbers, measured once in a few hundredths of a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

LONGEST = 1.5e-2
"""Seconds that one number may take to measure, beyond a few runs: four of them delay the first call. Chosen, not
measured."""


@dataclass(frozen=True)
class Machine:
    """Rates at which costs become seconds.

    Attributes
    ----------
    products
        Floating-point operations a second in large matrix products.
    batched
        The same in many small products, one for each sample (as under `torch.func.vmap`).
    bandwidth
        Bytes a second between memory and arithmetic.
    call
        Seconds that an operation takes however small it is.
    """

    products: float
    batched: float
    bandwidth: float
    call: float


def machine(dtype: torch.dtype) -> Machine:
    """The machine at hand, for one floating type and the present number of threads; measured on the first call."""
    return _measured(dtype, torch.get_num_threads())


@lru_cache
def _measured(dtype: torch.dtype, threads: int) -> Machine:
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    square, left, right = random(320, 320), random(64, 64, 64), random(64, 64, 64)
    large, small = random((1 << 24) // dtype.itemsize), random(4)
    return Machine(
        products=2 * 320**3 / _seconds(lambda: square @ square),
        batched=2 * 64 * 64**3 / _seconds(lambda: left @ right),
        # Into fresh memory, as layers write their results: the system has to hand out its pages first.
        bandwidth=3 * large.nbytes / _seconds(lambda: large + large),
        call=_seconds(lambda: small + small, 32),
    )


def _seconds(operation: Callable[[], Tensor], repeat: int = 1) -> float:
    """The shortest of a few runs: what else the machine does only ever adds to it."""
    operation()
    times: list[float] = []
    while len(times) < 4 or (len(times) < 64 and sum(times) * repeat < LONGEST):
        begin = time.perf_counter()
        for _ in range(repeat):
            operation()
        times.append((time.perf_counter() - begin) / repeat)
    return min(times)
