"""Products with a Jacobian that is never formed: gradients added up, and derivatives along directions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pathkernel._typing import Float, PyTree
from pathkernel.gradients.model_function import (
    REFUSALS,
    ModelFunction,
    leaf_parameters,
    pulled_back,
    push_forward,
    values_of,
)
from pathkernel.gradients.pytrees import blocks, count, moved, take
from pathkernel.runtime.interrupts import attempt, deliver
from pathkernel.tangent_kernel.engines.engine import Engine
from pathkernel.tangent_kernel.engines.jacobian import AutogradEngine
from pathkernel.tangent_kernel.outputs import OutputSelection


class JacobianProducts(ABC):
    r"""The Jacobian J of h at one θ, (n, K, P), as two linear maps.

    Where the kernel is a sum over components, :math:`J_k J_k^\top`, each component c has a direction of its own; for
    ``"full"`` blocks all components share one.
    """

    @abstractmethod
    def pull(self, weights: Tensor, components: slice) -> Float[Tensor, "K D P"]:
        """Gradients added up: Σ_i v_id ∇h_c(x_i) for c in ``components``, float64.

        ``weights`` is v, (n, D); for full blocks (n, K, D), and the result, (1, D, P), is over all components.
        """

    @abstractmethod
    def push(self, directions: Float[Tensor, "K D P"], components: slice) -> Tensor:
        """Derivatives along directions: Σ_c ⟨∇h_c(x_i), u_cd⟩, float64, (n, D); for full blocks (n, K, D)."""


class PlainJacobianProducts(JacobianProducts):
    """A reverse and a forward pass of the batch for each component and vector. Right for any model; memory O(P).

    Parameters
    ----------
    function, selection, theta
        Network, h and θ.
    X, context
        n samples and what h needs of each.
    block
        Samples per sweep.
    """

    def __init__(
        self,
        function: ModelFunction,
        selection: OutputSelection,
        theta: Float[Tensor, " P"],
        X: PyTree,
        context: PyTree,
        block: int = 256,
    ) -> None:
        self.function, self.selection, self.context = function, selection, context
        self.point, self.X = function.cast(theta), function.cast(X)
        self.full, self.pieces = selection.combine == "full", list(blocks(count(X), block))

    def _components(self, theta: Tensor, piece: slice) -> Tensor:
        """h of some samples, (n, K), as a function of θ."""
        outputs = self.function.batch(self.function.layout.unflatten(theta), take(self.X, piece))
        return values_of(self.selection.function, outputs, take(self.context, piece))

    def pull(self, weights: Tensor, components: slice) -> Tensor:
        """See `JacobianProducts.pull`."""
        chosen = [None] if self.full else list(range(components.start, components.stop))
        result = torch.zeros(
            len(chosen), weights.shape[-1], len(self.point), dtype=torch.float64, device=self.point.device
        )
        with self.function.running(gradients=True), self.function.kept():
            for piece in self.pieces:
                leaves = leaf_parameters(self.function, self.point)
                outputs = self.function.batch(leaves, take(self.X, piece))
                values = values_of(self.selection.function, outputs, take(self.context, piece))
                for place, c in enumerate(chosen):
                    for d in range(weights.shape[-1]):
                        cotangent = torch.zeros_like(values)
                        cotangent[:, slice(None) if c is None else c] = weights[piece, ..., d].to(values)
                        gradients = pulled_back(leaves, values, cotangent, retain=True)
                        result[place, d] += self.function.layout.flatten(gradients)
                deliver()
        return result

    def push(self, directions: Tensor, components: slice) -> Tensor:
        """See `JacobianProducts.push`."""
        return torch.cat([self._pushed(directions, components, piece) for piece in self.pieces])

    def _pushed(self, directions: Tensor, components: slice, piece: slice) -> Tensor:
        function: Callable[[Tensor], Tensor] = partial(self._components, piece=piece)
        along = directions.to(self.point)
        with self.function.running(), self.function.kept():
            if self.full:
                return torch.stack([push_forward(function, self.point, u).double() for u in along[0]], dim=-1)
            chosen = range(components.start, components.stop)
            return torch.stack(
                [
                    sum(push_forward(function, self.point, along[i, d])[:, c].double() for i, c in enumerate(chosen))  # type: ignore[misc]
                    for d in range(along.shape[1])
                ],
                dim=-1,
            )


class ProductsEngine(Engine):
    """A kernel matrix by kernel–vector products, one column at a time.

    For each column the gradient of one sample and then a jvp of all, for each component: time O(m K n · forward),
    memory O(P). The slowest way to a matrix, and the one that shares the least with the others.
    """

    name = "products"

    def _jacobian(self, theta: Tensor, X: PyTree, context: PyTree) -> PlainJacobianProducts:
        return PlainJacobianProducts(self.function, self.selection, theta, X, context)

    def _directions(self, theta: Tensor, X: PyTree, context: PyTree, i: int) -> tuple[Tensor, slice]:
        """Gradients of sample i, (K, 1, P), or for full blocks (1, K, P), and all components."""
        one, own = take(X, slice(i, i + 1)), take(context, slice(i, i + 1))
        z = self.function.outputs(theta, one)[0]
        k = self.selection.function(z, moved(take(own, 0), z.device)).numel()
        weights = torch.eye(k)[None] if self.selection.combine == "full" else torch.ones(1, 1)
        return self._jacobian(theta, one, own).pull(weights, slice(0, k)), slice(0, k)

    def gram(
        self, theta: Tensor, X: PyTree, Y: PyTree | None, context_X: PyTree, context_Y: PyTree, diagonal: Tensor | None
    ) -> Tensor:
        """K(X, Y), column by column; where the network refuses, by a loop of autograd over samples."""
        found = attempt(lambda: self._gram(theta, X, Y, context_X, context_Y, diagonal), REFUSALS)
        if isinstance(found, Exception):
            plain = AutogradEngine(self.function, self.selection, self.memory)
            return plain.gram(theta, X, Y, context_X, context_Y, diagonal)
        return found

    def _gram(
        self, theta: Tensor, X: PyTree, Y: PyTree | None, context_X: PyTree, context_Y: PyTree, diagonal: Tensor | None
    ) -> Tensor:
        columns, context = (X, context_X) if Y is None else (Y, context_Y)
        jacobian, found = self._jacobian(theta, X, context_X), []
        for j in range(count(columns)):
            directions, components = self._directions(theta, columns, context, j)
            directions = directions if diagonal is None else directions * diagonal.double()
            column = jacobian.push(directions, components)
            found.append(column / components.stop if self.selection.combine == "mean" else column)
        if self.selection.combine == "full":
            result = torch.stack(found, dim=1)
            return result if Y is not None else (result + result.permute(1, 0, 3, 2)) / 2
        result = torch.cat(found, dim=1)
        return result if Y is not None else (result + result.T) / 2

    def diagonal(self, theta: Tensor, X: PyTree, context: PyTree, diagonal: Tensor | None) -> Tensor:
        """K(x, x), from the gradients of one sample at a time."""
        found = []
        for i in range(count(X)):
            directions, components = self._directions(theta, X, context, i)
            weighted = directions if diagonal is None else directions * diagonal.double()
            if self.selection.combine == "full":
                found.append(weighted[0] @ directions[0].T)
            else:
                squared = (weighted * directions).sum()
                found.append(squared / components.stop if self.selection.combine == "mean" else squared)
        return torch.stack(found)


def error_of_engine(engine: Engine, theta: Tensor, X: PyTree, context: PyTree, diagonal: Tensor | None) -> float:
    r"""How far an engine's matrix K is from :math:`J M J^\top`, applied to a random vector: the largest difference.

    Relative to the largest entry of the product by one reverse and one forward pass of the batch, for each component;
    NaN where torch has no way to J v.
    """
    n = count(X)
    matrix = engine.gram(theta, X, None, context, None, diagonal)
    full = engine.selection.combine == "full"
    generator = torch.Generator().manual_seed(n)
    products = PlainJacobianProducts(engine.function, engine.selection, theta, X, context, block=n)
    k = matrix.shape[2] if full else number_of_components(engine, theta, X, context)
    u = torch.randn((n, k, 1) if full else (n, 1), dtype=torch.float64, generator=generator).to(matrix.device)
    directions = products.pull(u, slice(0, k))
    scaled = directions if diagonal is None else directions * diagonal.double()
    expected = attempt(lambda: products.push(scaled, slice(0, k)), REFUSALS)
    if isinstance(expected, Exception):
        return math.nan
    if engine.selection.combine == "mean":
        expected = expected / k
    found = torch.einsum("ijkl,jld->ikd", matrix, u) if full else matrix @ u
    scale = expected.abs().max().item()
    return (found - expected).abs().max().item() / (scale or 1.0)


def number_of_components(engine: Engine, theta: Tensor, X: PyTree, context: PyTree) -> int:
    """K, the numbers that h has of one sample."""
    z = engine.function.outputs(theta, take(X, slice(0, 1)))[0]
    return engine.selection.function(z, moved(take(context, 0), z.device)).numel()
