"""Speed of the machine at hand, or of a GPU in it: four numbers, measured once in a few hundredths of a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from pathkernel.gradients.matmul import product, tensor_float_products
from pathkernel.runtime.precision import EXACT_PRODUCTS

LONGEST = 1.5e-2
"""Seconds that one number may take to measure, beyond a few runs: four of them delay the first call. Chosen, not
measured."""

LARGE_ON_A_GPU = 2048, 1024
"""Size and number of the products that are timed on a GPU, which is idle for the most part of smaller ones. Chosen, not
measured."""

CPU = torch.device("cpu")


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


def machine(dtype: torch.dtype, device: torch.device = CPU, tensor_floats: bool = False) -> Machine:
    """The machine at hand, for one floating type and the present number of threads; measured on the first call.

    Of a GPU its own rates, and the time that starting an operation on it takes; of devices of other kinds those of the
    processor. Large products in full precision, or with factors that are rounded to TensorFloat-32.
    """
    return _measured(dtype, torch.get_num_threads(), device if device.type == "cuda" else CPU, tensor_floats)


@lru_cache
@EXACT_PRODUCTS
def _measured(dtype: torch.dtype, threads: int, device: torch.device, tensor_floats: bool) -> Machine:
    generator = torch.Generator(device).manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator, device=device).to(dtype)  # noqa: E731
    size, batch = (320, 64) if device == CPU else LARGE_ON_A_GPU
    square, left, right = random(size, size), random(batch, 64, 64), random(batch, 64, 64)
    large, small = random((1 << 24) // dtype.itemsize), random(4)
    wait = (lambda: None) if device == CPU else partial(torch.cuda.synchronize, device)
    with tensor_float_products(tensor_floats):
        squared = _seconds(lambda: product(square, square) if tensor_floats else square @ square, wait)
    return Machine(
        products=2 * size**3 / squared,
        batched=2 * batch * 64**3 / _seconds(lambda: left @ right, wait),
        # Into fresh memory, as layers write their results: the system has to hand out its pages first.
        bandwidth=3 * large.nbytes / _seconds(lambda: large + large, wait),
        call=_seconds(lambda: small + small, wait, 32),
    )


def _seconds(operation: Callable[[], Tensor], wait: Callable[[], object], repeat: int = 1) -> float:
    """The shortest of a few runs: what else the machine does only ever adds to it."""
    operation()
    times: list[float] = []
    while len(times) < 4 or (len(times) < 64 and sum(times) * repeat < LONGEST):
        wait()
        begin = time.perf_counter()
        for _ in range(repeat):
            operation()
        wait()
        times.append((time.perf_counter() - begin) / repeat)
    return min(times)
