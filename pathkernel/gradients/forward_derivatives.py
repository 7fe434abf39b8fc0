"""Derivatives of functions of θ along directions: forward, by dual numbers, or by two reverse sweeps."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.overrides import TorchFunctionMode

from pathkernel.gradients.forward_state import generator_states, set_generators
from pathkernel.runtime.interrupts import result_or_error

REFUSALS = (RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError, AssertionError)
"""Exceptions that torch raises in a call that a transformation does not cover."""


class _StoppedGradients(TorchFunctionMode):
    """Stops tangents where the gradient is stopped."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(args[0])  # which has no public name
        return found


@contextmanager
def gradients_stopped() -> Iterator[None]:
    """Differentiate forward inside as reverse sweeps differentiate.

    What a network computes inside `torch.no_grad()` is a constant to reverse sweeps; torch's forward differentiation
    goes on in there.
    """
    with torch.enable_grad():  # or the end of that block would not be told from its beginning
        enabled = torch._C._is_fwd_grad_enabled()
        try:
            with _StoppedGradients():
                yield
        finally:  # a network may leave in the middle
            torch._C._set_fwd_grad_enabled(enabled)


def push_forward(function: Callable[[Tensor], Tensor], point: Tensor, direction: Tensor) -> Tensor:
    r"""Directional derivative of a function at a point.

    By forward differentiation; where an operation has no rule for it, by two reverse sweeps,
    :math:`J v = \partial_u \langle J^\top u, v\rangle`.
    """
    load_transformations()

    def pushed() -> Tensor:
        with gradients_stopped():
            return jvp(function, (point,), (direction,))[1]

    found = result_or_error(pushed, REFUSALS)
    return push_by_reversing(function, point, direction) if isinstance(found, Exception) else found


def push_dual(function: Callable[[Tensor], Tensor], point: Tensor, direction: Tensor) -> Tensor:
    """`push_forward` of a function that draws random numbers, as dropout does.

    By dual numbers: under `torch.func.jvp` a tensor whose axes are not in the order of memory is filled with the same
    random numbers in another order, which makes it another function.
    """

    def pushed() -> Tensor:
        with gradients_stopped(), forward_ad.dual_level():
            primal, tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(point, direction)))
        return torch.zeros_like(primal) if tangent is None else tangent

    states = generator_states(point.device)
    found = result_or_error(pushed, REFUSALS)
    if not isinstance(found, Exception):
        return found
    set_generators(states)
    return push_by_reversing(function, point, direction)


def push_by_reversing(function: Callable[[Tensor], Tensor], point: Tensor, direction: Tensor) -> Tensor:
    """`push_forward` by two reverse sweeps."""
    states = generator_states(point.device)
    with torch.enable_grad():
        theta = point.detach().clone().requires_grad_(True)
        outputs = function(theta)
        u = torch.linspace(0.5, 1.5, outputs.numel(), dtype=outputs.dtype, device=outputs.device)
        u = u.reshape(outputs.shape).requires_grad_(True)
        (pulled,) = torch.autograd.grad(outputs, theta, u, create_graph=True)
        product = pulled @ direction
        (found,) = torch.autograd.grad(product, u)
    # Functions that are differentiable once drop out of the second sweep without a word: ⟨Jᵀu, v⟩ and ⟨u, J v⟩ differ.
    left, right = product.item(), (u * found).sum().item()
    scale, rounding = (u * found).abs().sum().item() + abs(left), math.sqrt(torch.finfo(outputs.dtype).eps)
    once = not abs(left - right) <= rounding * scale
    # Reentrant checkpoints hide the parameters that they use from `grad`, and not from `backward`.
    set_generators(states)  # it is called once more, and may draw random numbers
    with torch.enable_grad():
        whole = point.detach().clone().requires_grad_(True)
        function(whole).backward(u.detach())
    hidden = whole.grad is not None and not (whole.grad - pulled).norm() <= rounding * whole.grad.norm()
    if once or hidden:
        raise NotImplementedError("a function in the network can be differentiated only once, or not by `grad`")
    return found.detach()


@functools.cache
def load_transformations() -> None:
    """Let torch build what its transformations need, once: some megabytes and tenths of a second at their first use.

    Without its warning about how it builds the decompositions of forward differentiation.
    """
    layer = torch.nn.functional.layer_norm
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=DeprecationWarning)
        point, directions = torch.zeros(3, 2), torch.ones(2, 3, 2)
        vmap(lambda v: jvp(lambda x: layer(x, (2,)), (point,), (v,))[1])(directions)
        vmap(grad(lambda x: layer(x, (2,)).sum()))(point)
