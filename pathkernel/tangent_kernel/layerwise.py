"""The layer-wise engine: activations × back-propagated signals, contracted without forming a Jacobian."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from pathkernel._typing import PyTree
from pathkernel.functional import ModelFunction
from pathkernel.layers.factors import Piece
from pathkernel.layers.proved import ProvedTapes
from pathkernel.layers.tape import Tape
from pathkernel.parameters import ParameterLayout
from pathkernel.pytrees import blocks, count, take
from pathkernel.tangent_kernel.contraction import parts
from pathkernel.tangent_kernel.engine import Engine
from pathkernel.tangent_kernel.jacobian import JacobianEngine
from pathkernel.tangent_kernel.matrix_products import empty
from pathkernel.tangent_kernel.operands import TILE, Form, Group, Metric, contract, mirror, numbers, row_numbers
from pathkernel.tangent_kernel.outputs import OutputSelection

__all__ = ["TILE", "LayerwiseEngine"]

PASS = 128 << 20
"""Bytes of one pass through the network: what it leaves behind should still be near when it is used."""

BLOCKS = 256
"""Samples on each side of a tile of blocks of all pairs of components."""


@dataclass(frozen=True)
class Sizes:
    """Bytes that a sample takes, as a number and so much more for each component.

    Attributes
    ----------
    components
        K.
    passing
        While it passes through the network.
    held
        From then until it is contracted.
    """

    components: int
    passing: tuple[float, float]
    held: tuple[float, float]


@dataclass(frozen=True)
class Plan:
    """How a kernel matrix is cut up so that it fits into a budget.

    Attributes
    ----------
    components
        Components in hand at once.
    passing
        Samples in one pass through the network.
    left, right
        Samples held on each side.
    scratch
        Bytes for tiles.
    """

    components: int
    passing: int
    left: int
    right: int
    scratch: int

    @classmethod
    def of(cls, sizes: Sizes, memory: int, n: int, m: int | None, full: bool) -> Plan:
        """For n × m samples, m None for a symmetric matrix: half of the budget is held, the rest is in motion."""
        held, passing, scratch = memory // 2, memory // 4, memory // 8
        samples = n + (m or 0)
        chosen = sizes.components
        if not full:  # the trace is a sum over components, a few at a time
            spare = held / samples - sizes.held[0]
            chosen = max(1, min(chosen, int(spare // max(1.0, sizes.held[1]))))
        each = sizes.held[0] + chosen * sizes.held[1]
        left, right = n, n if m is None else m
        if each * samples > held:
            left, right = (max(1, int(part * held / each)) for part in (0.75, 0.25))
        pass_size = max(1, int(min(passing, PASS) / (sizes.passing[0] + chosen * sizes.passing[1])))
        return cls(chosen, pass_size, min(left, n), right, scratch)


class LayerwiseEngine(Engine):
    r"""Layer by layer, :math:`(A A^\top) \odot (\Delta \Delta^\top)` or rows of one layer at a time, as is cheaper.

    Time O(n K · backward + Σ_layers n² (q + K p)) in place of n² K P; memory: activations and signals of the samples
    in hand, within the budget, never n × P. Parameters that the layers do not account for (`coverage`) go to the plain
    engine, parameter by parameter.
    """

    name = "layerwise"

    def __init__(self, function: ModelFunction, selection: OutputSelection, memory: int) -> None:
        super().__init__(function, selection, memory)
        self.tapes = ProvedTapes(self.function)
        self._sizes: dict[Any, Sizes] = {}

    @property
    def full(self) -> bool:
        """Whether blocks of all pairs of components are asked for."""
        return self.selection.combine == "full"

    # -- gradients of some samples ---------------------------------------------------------------------------

    def pieces(
        self, theta: Tensor, X: PyTree, context: PyTree, components: slice = slice(None)
    ) -> tuple[list[Piece], Tape]:
        """Gradients of h, or of some of its components, in factored form, and the tape they come from."""
        tape = self.tapes.record(theta, X, self.function)
        with torch.enable_grad():
            if self.selection.identity:
                chosen = slice(*components.indices(tape.outputs.shape[1]))
                return tape.pieces(tape.outputs[:, chosen], chosen), tape
            h = vmap(self.selection.function)(tape.outputs, context)
            return tape.pieces(h.reshape(tape.n, -1)[:, components]), tape

    def sizes(self, theta: Tensor, X: PyTree, context: PyTree, form: Form) -> Sizes:
        """What a sample takes, from a pass of two; once for each shape of samples."""
        leaves = [leaf for leaf in pytree.tree_leaves((X, context)) if isinstance(leaf, Tensor)]
        key = (*((leaf.shape[1:], leaf.dtype) for leaf in leaves), form.metric.diagonal is None)
        if key not in self._sizes:
            self._sizes[key] = self._measured(theta, X, context, form)
        return self._sizes[key]

    def _measured(self, theta: Tensor, X: PyTree, context: PyTree, form: Form) -> Sizes:
        few = min(2, count(X))
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        own = take(X, slice(0, few))
        pieces, tape = self.pieces(theta, own, take(context, slice(0, few)))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.tapes.record(theta, own, self.function)
        parameters = self.function.layout.size * self.function.dtype.itemsize
        item, k = self.function.dtype.itemsize, self._components(pieces, tape)
        outputs = sum(shape.numel() for shape in tape.shapes) * item
        graph = max(0, sum(saved.values()) - parameters) + 2 * outputs
        fixed, varying, kept_fixed, kept = 0, 0, 0, 0
        for piece in pieces:
            factor = piece.factor
            own = numbers(factor) * item
            signals = factor.signal.numel() * item if hasattr(factor, "signal") else own
            fixed, varying = fixed + own - signals, varying + 2 * signals
            if not form.by_pairs(piece) and form.by_kept_rows(piece):
                rows = row_numbers(factor) * item
                varying, kept = varying + rows, kept + rows
            else:
                kept_fixed, kept = kept_fixed + own - signals, kept + signals
        return Sizes(
            k, ((graph + fixed) / few, varying / k / few), (kept_fixed / few, max(1.0, kept / k / few))
        )

    def _components(self, pieces: list[Piece], tape: Tape) -> int:
        """K."""
        if pieces:
            return pieces[0].factor.components
        return tape.outputs.shape[1] if self.selection.identity else 1

    def _bytes_per_sample(self, theta: Tensor, X: PyTree, context: PyTree) -> int:
        """What one sample takes in a pass."""
        sizes = self.sizes(theta, X, context, self._form(None, 1, 1))
        return int(sizes.passing[0] + sizes.components * sizes.passing[1])

    def _form(self, diagonal: Tensor | None, n: int, m: int) -> Form:
        return Form((n, m), self.full, Metric(diagonal), self.products)

    def _group(
        self, theta: Tensor, X: PyTree, context: PyTree, form: Form, components: slice, passing: int
    ) -> Group:
        """Some samples, a few in each pass."""

        def passes() -> Iterator[tuple[slice, list[Piece]]]:
            for piece in blocks(count(X), passing):
                yield piece, self.pieces(theta, take(X, piece), take(context, piece), components)[0]

        return Group.joined(count(X), passes(), form)

    # -- the contract ----------------------------------------------------------------------------------------

    def gram(
        self, theta: Tensor, X: PyTree, Y: PyTree | None, context_X: PyTree, context_Y: PyTree, diagonal: Tensor | None
    ) -> Tensor:
        """K(X, Y); with Y None only entries on and above the diagonal are computed."""
        n, m = count(X), count(X if Y is None else Y)
        form = self._form(diagonal, n, m)
        sizes = self.sizes(theta, X, context_X, form)
        plan = Plan.of(sizes, self.memory, n, None if Y is None else m, self.full)
        k = sizes.components if self.full else 1
        result = empty((k, n, k, m), torch.float64)
        tile = min(BLOCKS, max(1, isqrt(plan.scratch // (24 * k)))) if self.full else max(n, m)
        groups = [slice(i.start + j.start, i.start + j.stop) for i in blocks(n, plan.left) for j in _cut(i, tile)]
        for components in blocks(sizes.components, plan.components):
            every = slice(None) if self.full else components

            def groups_of(Z: PyTree, context: PyTree, block: slice) -> list[tuple[slice, Group]]:
                return [
                    (own, self._group(theta, take(Z, own), take(context, own), form, every, plan.passing))
                    for own in (slice(block.start + c.start, block.start + c.stop) for c in _cut(block, tile))
                ]

            first = components.start == 0
            for block in blocks(n, plan.left):
                left = groups_of(X, context_X, block)
                if Y is None:
                    for place, (i, one) in enumerate(left):
                        for j, two in left[place:]:
                            contract(one, two, result[:, i, :, j], form, same=i == j, first=first, scratch=plan.scratch)
                Z, context, begin = (X, context_X, block.stop) if Y is None else (Y, context_Y, 0)
                for other in blocks(m - begin, plan.right):
                    for j, two in groups_of(Z, context, slice(begin + other.start, begin + other.stop)):
                        for i, one in left:
                            contract(one, two, result[:, i, :, j], form, same=False, first=first, scratch=plan.scratch)
        if Y is None:
            mirror(result, groups)
        if self.selection.combine == "mean":
            result /= sizes.components
        found = result.permute(1, 3, 0, 2) if self.full else result[0, :, 0]
        plain = self._plain_engine(theta)
        if plain is not None:
            engine, own, where = plain
            found += engine.gram(own, X, Y, context_X, context_Y, None if diagonal is None else diagonal[where])
        return found

    def diagonal(self, theta: Tensor, X: PyTree, context: PyTree, diagonal: Tensor | None) -> Tensor:
        """K(x, x), sample by sample."""
        form = self._form(diagonal, 1, 1)
        sizes = self.sizes(theta, X, context, form)
        plan = Plan.of(sizes, self.memory, count(X), None, True)
        found = []
        for piece in blocks(count(X), plan.passing):
            pieces, _ = self.pieces(theta, take(X, piece), take(context, piece))
            found.append(self._diagonal(pieces, piece.stop - piece.start, sizes.components, form.metric))
        result = torch.cat(found)
        plain = self._plain_engine(theta)
        if plain is not None:
            engine, own, where = plain
            result += engine.diagonal(own, X, context, None if diagonal is None else diagonal[where])
        return result

    def _diagonal(self, pieces: list[Piece], n: int, k: int, metric: Metric) -> Tensor:
        total = torch.zeros((n, k, k) if self.full else (n,), dtype=torch.float64)
        for piece in pieces:
            rows = [(where, part.factor.rows()) for where, part in parts(piece, self.memory // (8 * n))]
            if piece.bias is not None:
                rows.append((piece.bias, piece.bias_rows()))
            for where, own in rows:
                weighted = metric.applied(own.double(), where)
                total += weighted @ weighted.mT if self.full else weighted.square().sum(dim=(1, 2))
        return total / k if self.selection.combine == "mean" else total

    def _plain_engine(self, theta: Tensor) -> tuple[JacobianEngine, Tensor, Tensor] | None:
        """The plain engine for the parameters that the tape does not cover, their values, and where they are."""
        coverage, layout = self.tapes.coverage, self.function.layout
        names = [name for name in layout.names if coverage is not None and name in coverage.plain]
        if not names:
            return None
        values = layout.unflatten(theta)
        own = ParameterLayout.of({name: values[name] for name in names})
        rest = {name: value for name, value in values.items() if name not in own.slices}
        function = ModelFunction(
            self.function.module, own, {**self.function.constants, **rest}, self.function.dtype, self.function.state,
            self.function.tap,
        )
        where = torch.cat([torch.arange(layout.slices[name].start, layout.slices[name].stop) for name in names])
        return JacobianEngine(function, self.selection, self.memory), theta[where], where


def _cut(block: slice, size: int) -> Iterator[slice]:
    return blocks(block.stop - block.start, size)
