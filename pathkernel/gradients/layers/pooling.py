"""Average pooling whose signals are spread line by line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _WindowsBesideEachOther(torch.autograd.Function):
    """On the CPU torch's own backward pass goes entry by entry: thrice as slow, a fifth of a small network's time."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, height: int, width: int) -> Tensor:
        """Means of windows."""
        return F.avg_pool2d(input, (height, width))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        """The windows."""
        _, ctx.height, ctx.width = inputs

    @staticmethod
    def backward(ctx: Any, *signals: Tensor) -> tuple[Tensor, None, None]:
        """Each signal, spread evenly over its window."""
        lines = _repeated(signals[0] / (ctx.height * ctx.width), ctx.width)
        return torch.stack([lines] * ctx.height, dim=-2).flatten(-3, -2), None, None


def _repeated(values: Tensor, times: int) -> Tensor:
    """Each entry of the last axis, several times beside itself."""
    if times == 2 and values.dtype in (torch.float32, torch.float64):
        # Pairs of equal numbers are complex numbers, which are written in a quarter of the time of a stack.
        return torch.view_as_real(torch.complex(values, values)).flatten(-2)
    return torch.stack([values] * times, dim=-1).flatten(-2)


def average_pooling(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """`torch.nn.functional.avg_pool2d`, the same to the last bit; windows that cover the input once go another way."""
    kernel, step, border = (_pair(value) for value in (kernel_size, stride or kernel_size, padding))
    once = kernel == step and border == (0, 0) and divisor_override is None and input.is_cpu
    if once and input.dim() == 4 and not any(size % k for size, k in zip(input.shape[2:], kernel, strict=True)):
        pooled: Tensor = _WindowsBesideEachOther.apply(input, *kernel)
        return pooled
    return F.avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


REPLACEMENTS: dict[Any, Callable[..., Any]] = {F.avg_pool2d: average_pooling}
"""Functions without parameters → functions with the same values and signals, whose backward passes are faster."""
