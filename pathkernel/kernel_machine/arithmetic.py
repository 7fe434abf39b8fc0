"""Floating type that a kernel machine works in."""

from __future__ import annotations

import torch

from pathkernel.errors import InputError
from pathkernel.gradients.forward_state import generators_untouched
from pathkernel.gradients.low_types import LOW, low_types
from pathkernel.quadrature import Quadrature
from pathkernel.runtime.interrupts import result_or_error
from pathkernel.trajectory.trajectory import Trajectory


def asked_type(dtype: torch.dtype | str | None, quadrature: Quadrature, trajectory: Trajectory) -> torch.dtype | None:
    """Type that a machine was asked to work in, or that its quadrature needs; None for neither.

    Raises
    ------
    InputError
        For a type that cannot follow the recorded steps.
    """
    needed = quadrature.arithmetic
    if isinstance(dtype, str):
        raise InputError(
            f"A kernel machine was asked to work in {dtype!r}",
            "It is exact where its products are not rounded more coarsely than training rounds its own, and takes "
            "types of torch",
            'Leave `dtype` out; kernels, `TangentKernel` and `PathKernel`, take `dtype="tf32"` on a GPU',
        )
    if dtype is not None and needed is not None and dtype != needed:
        raise InputError(
            f"`{quadrature!r}` was asked to work in {dtype}",
            f"It refines below that type's rounding and needs {needed}",
            "Leave `dtype` out, or use `DiscreteGradient()`",
        )
    if dtype in LOW and trajectory.precision not in LOW:
        raise InputError(
            f"A kernel machine of steps in {trajectory.precision} was asked to work in {dtype}",
            "It is exact where its gradients are those of training, which are not rounded so coarsely",
            "Leave `dtype` out; kernels, `TangentKernel` and `PathKernel`, take `dtype=torch.bfloat16`",
        )
    return dtype or needed


def unrounded_type(trajectory: Trajectory) -> torch.dtype | None:
    """Type in which a network that enters autocast by itself rounds nothing; None for the recorded one."""

    def low() -> bool:
        with generators_untouched():
            return bool(low_types(trajectory.function(), trajectory.initial, trajectory.data.example[0]))

    return torch.float64 if result_or_error(low, (Exception,)) is True else None
