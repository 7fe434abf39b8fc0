"""Kernel–vector products without the kernel: K v = J (M (Jᵀ v)), one vjp and one jvp."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from pathkernel._typing import PyTree
from pathkernel.functional import ModelFunction
from pathkernel.pytrees import blocks, cast_floating, count, take
from pathkernel.tangent_kernel.outputs import OutputSelection


def kernel_vector_product(
    function: ModelFunction,
    selection: OutputSelection,
    theta: Tensor,
    X: PyTree,
    context: PyTree,
    v: Tensor,
    block: int = 256,
) -> Tensor:
    """K(X, X) v at θ.

    Parameters
    ----------
    function, selection, theta
        Network, h and θ.
    X, context
        n samples and what h needs of each.
    v
        (n,), or (n, K) for full blocks.
    block
        Samples per sweep.

    Returns
    -------
    Tensor
        float64 of v's shape; time of about five forward passes, memory O(P).
    """
    X = cast_floating(X, function.dtype)
    v = v.to(function.dtype)
    full, mean = selection.combine == "full", selection.combine == "mean"
    layout = function.layout

    def components_of(outputs: Tensor, sample_context: PyTree) -> Tensor:
        return selection.function(outputs, sample_context).reshape(-1)

    def outputs(theta: Tensor, piece: slice) -> Tensor:
        batch = function.batch(layout.unflatten(theta), take(X, piece))
        return vmap(components_of)(batch, take(context, piece))

    point = theta.to(function.dtype)
    pieces = list(blocks(count(X), block))
    with function.running():
        if full:
            return _apply(outputs, point, pieces, v)
        components = outputs(point, slice(0, 1)).shape[1]
        products = torch.zeros(count(X), dtype=torch.float64)
        # The trace kernel is a sum over components: each is the kernel of one output.
        for k in range(components):
            column = torch.zeros(count(X), components, dtype=v.dtype)
            column[:, k] = v
            products += _apply(outputs, point, pieces, column)[:, k]
        return products / components if mean else products


def _apply(outputs: Callable[..., Tensor], point: Tensor, pieces: list[slice], v: Tensor) -> Tensor:
    direction = torch.zeros_like(point)
    for piece in pieces:
        pull_back = vjp(partial(outputs, piece=piece), point)[1]
        direction += pull_back(v[piece])[0]
    pushed = [jvp(partial(outputs, piece=piece), (point,), (direction,))[1] for piece in pieces]
    return torch.cat(pushed).double()
