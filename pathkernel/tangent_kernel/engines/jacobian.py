"""The plain engines: rows of gradients, by `torch.func` or by a loop of autograd, contracted block by block."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import PyTree
from pathkernel.gradients.matmul import product, tensor_float_products
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.per_sample import sample_gradients
from pathkernel.gradients.pytrees import blocks, count, take
from pathkernel.runtime.interrupts import defer_interrupts, deliver_interrupt
from pathkernel.runtime.precision import EXACT_PRODUCTS
from pathkernel.tangent_kernel.engines.engine import Diagonal, Engine, check_budget
from pathkernel.tangent_kernel.outputs import OutputSelection


class JacobianEngine(Engine):
    """``vmap(grad)`` or ``vmap(jacrev)`` over samples, then one matrix product per pair of blocks.

    Time O(n K · backward + n m K P), memory two blocks of gradient rows within the budget.
    """

    name = "jacobian"
    route: ClassVar[str | None] = None
    """Route of `pathkernel.gradients.per_sample.sample_gradients`."""

    def __init__(
        self, function: ModelFunction, selection: OutputSelection, memory: int, tensor_floats: bool = False
    ) -> None:
        super().__init__(function, selection, memory, tensor_floats)
        self.known: dict[Any, int] = {}

    def rows(self, theta: Tensor, X: PyTree, context: PyTree) -> Tensor:
        """∇h of each sample, (n, K, P)."""
        gradients = sample_gradients(
            self.function, theta, X, self.selection.function, context, scalar=self.selection.scalar, route=self.route
        )
        rows = self.function.layout.flatten(gradients)
        return rows.unsqueeze(1) if self.selection.scalar else rows

    def block_size(self, theta: Tensor, X: PyTree, context: PyTree) -> int:
        """Samples per block: rows of two blocks, twice each while they are made, within the budget."""
        key = tuple(leaf.shape[1:] for leaf in pytree.tree_leaves((X, context)))
        if key not in self.known:
            one = slice(0, 1)
            self.known[key] = self.rows(theta, take(X, one), take(context, one)).shape[1]
        row_bytes = self.known[key] * self.function.layout.size * self.function.dtype.itemsize
        check_budget(row_bytes, self.memory, "rows of its gradients")
        return max(1, self.memory // (4 * row_bytes))

    def contract(self, left: Tensor, right: Tensor) -> Tensor:
        """Inner products of two blocks of rows, float64."""
        (n, k, p), (m, j, _) = left.shape, right.shape
        full = self.selection.combine == "full"
        factors = (left.reshape(n * k, p), right.reshape(m * j, p)) if full else (left.flatten(1), right.flatten(1))
        with tensor_float_products(self.tensor_floats):
            products = product(*(factor.to(self.products) for factor in factors)).double()
        if full:
            return products.reshape(n, k, m, j).transpose(1, 2)
        return products / k if self.selection.combine == "mean" else products

    @defer_interrupts(divisible=True)
    @EXACT_PRODUCTS
    def gram(
        self, theta: Tensor, X: PyTree, Y: PyTree | None, context_X: PyTree, context_Y: PyTree, preconditioner: Diagonal
    ) -> Tensor:
        """K(X, Y); with Y None only the upper triangle of blocks is computed."""
        size = self.block_size(theta, X, context_X)
        if Y is None:
            return self._symmetric(theta, X, context_X, preconditioner, size)
        result = None
        for i in blocks(count(X), size):
            left = self.rows(theta, take(X, i), take(context_X, i))
            left = left if preconditioner is None else left * preconditioner.to(left)
            for j in blocks(count(Y), size):
                tile = self.contract(left, self.rows(theta, take(Y, j), take(context_Y, j)))
                if result is None:
                    result = torch.empty(count(X), count(Y), *tile.shape[2:], dtype=torch.float64, device=tile.device)
                result[i, j] = tile
                deliver_interrupt()
        assert result is not None
        return result

    def _symmetric(self, theta: Tensor, X: PyTree, context: PyTree, preconditioner: Diagonal, size: int) -> Tensor:
        n, result = count(X), None
        # √d on both sides keeps every tile a product of a matrix with its own transpose.
        root = None if preconditioner is None else preconditioner.sqrt()

        def scaled(piece: slice) -> Tensor:
            rows = self.rows(theta, take(X, piece), take(context, piece))
            return rows if root is None else rows * root.to(rows)

        for i in blocks(n, size):
            left = scaled(i)
            for j in blocks(n, size):
                if j.start < i.start:
                    continue
                tile = self.contract(left, left if i == j else scaled(j))
                if result is None:
                    result = torch.empty(n, n, *tile.shape[2:], dtype=torch.float64, device=tile.device)
                if i == j:
                    tile = (tile + _transpose(tile)) / 2
                result[i, j] = tile
                result[j, i] = _transpose(tile)
                deliver_interrupt()
        assert result is not None
        return result

    @defer_interrupts(divisible=True)
    @EXACT_PRODUCTS
    def diagonal(self, theta: Tensor, X: PyTree, context: PyTree, preconditioner: Diagonal) -> Tensor:
        """K(x, x), one block of rows at a time."""
        pieces = []
        for i in blocks(count(X), self.block_size(theta, X, context)):
            rows = self.rows(theta, take(X, i), take(context, i)).double()
            weighted = rows if preconditioner is None else rows * preconditioner.double()
            if self.selection.combine == "full":
                pieces.append(torch.einsum("nkp,njp->nkj", weighted, rows))
            else:
                squared = (weighted * rows).sum(dim=(1, 2))
                pieces.append(squared / rows.shape[1] if self.selection.combine == "mean" else squared)
        return torch.cat(pieces)


class AutogradEngine(JacobianEngine):
    """Gradients by plain autograd, one sample and component after the other: the route of last resort.

    Covers whatever `torch.func` refuses: checkpoints, `.item()`, `nonzero`, custom functions without a rule for `vmap`.
    """

    name = "autograd"
    route = "autograd"


def _transpose(tile: Tensor) -> Tensor:
    """K(x', x) of a tile K(x, x'): samples and, in full blocks, outputs change places."""
    return tile.transpose(0, 1) if tile.dim() == 2 else tile.permute(1, 0, 3, 2)
