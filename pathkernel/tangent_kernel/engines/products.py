"""The products engine: a kernel matrix by products with a Jacobian that is never formed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pathkernel._typing import PyTree
from pathkernel.gradients.forward_derivatives import REFUSALS
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.pytrees import count, moved, take
from pathkernel.runtime.interrupts import result_or_error
from pathkernel.tangent_kernel.engines.engine import Diagonal, Engine, number_of_components
from pathkernel.tangent_kernel.engines.jacobian import AutogradEngine
from pathkernel.tangent_kernel.engines.jacobian_products import PlainJacobianProducts
from pathkernel.tangent_kernel.outputs import OutputSelection


class ProductsEngine(Engine):
    """A kernel matrix by kernel–vector products, one column at a time.

    For each column the gradient of one sample and then a jvp of all, for each component: time O(m K n · forward),
    memory O(P). The slowest way to a matrix, and the one that shares the least with the others.
    """

    name = "products"

    def __init__(
        self, function: ModelFunction, selection: OutputSelection, memory: int, tensor_floats: bool = False
    ) -> None:
        super().__init__(function, selection, memory)  # there are no products between gradients to be rounded

    def _directions(self, theta: Tensor, X: PyTree, context: PyTree, i: int) -> tuple[Tensor, slice]:
        """Gradients of sample i, (K, 1, P), or for full blocks (1, K, P), and all components."""
        one, own = take(X, slice(i, i + 1)), take(context, slice(i, i + 1))
        z = self.function.outputs(theta, one)[0]
        k = self.selection.function(z, moved(take(own, 0), z.device)).numel()
        weights = torch.eye(k)[None] if self.selection.combine == "full" else torch.ones(1, 1)
        return self.jacobian(theta, (one, own), 0).pull(weights, slice(0, k)), slice(0, k)

    def gram(
        self, theta: Tensor, X: PyTree, Y: PyTree | None, context_X: PyTree, context_Y: PyTree, preconditioner: Diagonal
    ) -> Tensor:
        """K(X, Y), column by column; where the network refuses, by a loop of autograd over samples."""
        found = result_or_error(lambda: self._gram(theta, X, Y, context_X, context_Y, preconditioner), REFUSALS)
        if isinstance(found, Exception):
            plain = AutogradEngine(self.function, self.selection, self.memory)
            return plain.gram(theta, X, Y, context_X, context_Y, preconditioner)
        return found

    def _gram(
        self, theta: Tensor, X: PyTree, Y: PyTree | None, context_X: PyTree, context_Y: PyTree, preconditioner: Diagonal
    ) -> Tensor:
        columns, context = (X, context_X) if Y is None else (Y, context_Y)
        jacobian, found = self.jacobian(theta, (X, context_X), 0), []
        for j in range(count(columns)):
            directions, components = self._directions(theta, columns, context, j)
            directions = directions if preconditioner is None else directions * preconditioner.double()
            column = jacobian.push(directions, components)
            found.append(column / components.stop if self.selection.combine == "mean" else column)
        if self.selection.combine == "full":
            result = torch.stack(found, dim=1)
            return result if Y is not None else (result + result.permute(1, 0, 3, 2)) / 2
        result = torch.cat(found, dim=1)
        return result if Y is not None else (result + result.T) / 2

    def diagonal(self, theta: Tensor, X: PyTree, context: PyTree, preconditioner: Diagonal) -> Tensor:
        """K(x, x), from the gradients of one sample at a time."""
        found = []
        for i in range(count(X)):
            directions, components = self._directions(theta, X, context, i)
            weighted = directions if preconditioner is None else directions * preconditioner.double()
            if self.selection.combine == "full":
                found.append(weighted[0] @ directions[0].T)
            else:
                squared = (weighted * directions).sum()
                found.append(squared / components.stop if self.selection.combine == "mean" else squared)
        return torch.stack(found)


def error_of_engine(engine: Engine, theta: Tensor, X: PyTree, context: PyTree, preconditioner: Diagonal) -> float:
    r"""Largest difference of an engine's matrix K from :math:`J M J^\top`, applied to a random vector.

    Relative to the largest entry of the product by one reverse and one forward pass of the batch, for each component;
    NaN where torch has no way to J v.
    """
    n = count(X)
    matrix = engine.gram(theta, X, None, context, None, preconditioner)
    full = engine.selection.combine == "full"
    generator = torch.Generator().manual_seed(n)
    products = PlainJacobianProducts(engine.function, engine.selection, theta, X, context, block=n)
    k = matrix.shape[2] if full else number_of_components(engine, theta, X, context)
    u = torch.randn((n, k, 1) if full else (n, 1), dtype=torch.float64, generator=generator).to(matrix.device)
    directions = products.pull(u, slice(0, k))
    scaled = directions if preconditioner is None else directions * preconditioner.double()
    expected = result_or_error(lambda: products.push(scaled, slice(0, k)), REFUSALS)
    if isinstance(expected, Exception):
        return math.nan
    if engine.selection.combine == "mean":
        expected = expected / k
    found = torch.einsum("ijkl,jld->ikd", matrix, u) if full else matrix @ u
    scale = expected.abs().max().item()
    return (found - expected).abs().max().item() / (scale or 1.0)
