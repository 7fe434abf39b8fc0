"""Query outputs as functions of θ, and one training step as a quadrature sees it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from pathkernel._typing import Float, Int, PyTree
from pathkernel.functional import ModelFunction, OutputFunctional, gradients_along, push_forward, sample_gradients
from pathkernel.pytrees import blocks, cast_floating, count, take
from pathkernel.trajectory.step import Segment


class Queries:
    """Q scalar functions of θ: K components of h(f(θ, x_j), context_j) for each of n samples, Q = n·K.

    Parameters
    ----------
    function
        The network.
    inputs, context
        n samples and what h needs of each of them.
    functional
        h, returning a scalar (then K = 1) or (K,).
    components
        K, or None for a scalar h.
    memory
        Bytes for intermediate rows of gradients.

    Notes
    -----
    ``scale`` is what a curve's errors are relative to, (Q,), once a curve has been laid through them.

    Query q is component ``q % K`` of sample ``q // K``. Everything is returned in float64.
    """

    def __init__(
        self,
        function: ModelFunction,
        inputs: PyTree,
        functional: OutputFunctional,
        context: PyTree,
        components: int | None,
        memory: int,
    ) -> None:
        self.function, self.functional, self.memory = function, functional, memory
        self.inputs, self.context = cast_floating(inputs, function.dtype), cast_floating(context, function.dtype)
        self.scalar, self.components = components is None, components or 1
        self.scale: Tensor | None = None

    def __len__(self) -> int:
        return count(self.inputs) * self.components

    def under(self, buffers: Mapping[str, Tensor]) -> Queries:
        """The same queries with some of the network's buffers replaced."""
        if not buffers:
            return self
        other = copy.copy(self)
        other.function = self.function.replaced(constants=buffers)
        return other

    def block(self, piece: slice) -> Queries:
        """The queries of some of the samples."""
        return Queries(
            self.function,
            take(self.inputs, piece),
            self.functional,
            take(self.context, piece),
            None if self.scalar else self.components,
            self.memory,
        )

    def values(self, theta: Float[Tensor, " P"]) -> Float[Tensor, " Q"]:
        """h at θ."""
        with torch.no_grad(), self.function.running():
            return self._values(theta.to(self.function.dtype), self.inputs, self.context).double().reshape(-1)

    def _values(self, theta: Tensor, inputs: PyTree, context: PyTree) -> Tensor:
        outputs = self.function.batch(self.function.layout.unflatten(theta), inputs)
        return vmap(self.functional)(outputs, context)

    def rows(self, theta: Float[Tensor, " P"]) -> Float[Tensor, "Q P"]:
        """∇h at θ."""
        size = self.function.layout.size
        result = torch.empty(len(self), size, dtype=torch.float64)
        per_sample = 4 * self.components * size * torch.finfo(self.function.dtype).bits // 8
        for piece in blocks(count(self.inputs), self.memory // per_sample):
            rows = sample_gradients(
                self.function,
                theta,
                take(self.inputs, piece),
                self.functional,
                take(self.context, piece),
                scalar=self.scalar,
            )
            target = result[piece.start * self.components : piece.stop * self.components]
            for name, where in self.function.layout.slices.items():
                target[:, where] = rows[name].reshape(len(target), -1)
        return result

    def _single(self, queries: Int[Tensor, " n"]) -> tuple[OutputFunctional, PyTree, PyTree]:
        """The given queries as scalar functionals with their inputs and context."""
        samples = queries // self.components
        inputs, context = take(self.inputs, samples), take(self.context, samples)
        if self.scalar:
            return self.functional, inputs, context
        chosen = torch.nn.functional.one_hot(queries % self.components, self.components).to(self.function.dtype)
        return (lambda z, c: self.functional(z, c[0]) @ c[1]), inputs, (context, chosen)

    def rows_at(self, segment: Segment, times: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Values (n,) and gradients (n, P) of some queries, each at its own time of a segment."""
        functional, inputs, context = self._single(queries)
        per_query = 6 * self.function.layout.size * torch.finfo(self.function.dtype).bits // 8
        pieces = [
            gradients_along(
                self.function,
                segment.start,
                segment.displacement,
                times[piece],
                take(inputs, piece),
                functional,
                take(context, piece),
            )
            for piece in blocks(len(queries), self.memory // per_query)
        ]
        return torch.cat([v for v, _ in pieces]).double(), torch.cat([g for _, g in pieces]).double()

    def products(self, theta: Float[Tensor, " P"], directions: Float[Tensor, "D P"]) -> Float[Tensor, "Q D"]:
        """∇h·v at θ for a few directions, by forward differentiation; by rows where an operation has none."""
        point = theta.to(self.function.dtype)

        def along(direction: Tensor) -> Tensor:
            return push_forward(lambda t: self._values(t, self.inputs, self.context), point, direction)

        try:
            with torch.no_grad(), self.function.running():
                columns = [along(direction.to(point)).double().reshape(-1) for direction in directions]
        except NotImplementedError:  # forward differentiation does not cover every operation, LSTM's for one
            return torch.cat([self.block(piece).rows(theta) @ directions.T for piece in blocks(count(self.inputs), 64)])
        return torch.stack(columns, dim=1)

    def products_at(
        self, segment: Segment, times: Tensor, queries: Tensor, directions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Values (n,) and products (n, D) of some queries, each at its own time of a segment."""
        values, rows = self.rows_at(segment, times, queries)
        return values, rows @ directions.T


class RowStep:
    """One segment with gradients as rows of P numbers; see `pathkernel.quadrature.QueryStep`.

    Parameters
    ----------
    queries, segment
        Whose gradients, and where.
    neighbour
        The segment's neighbour in the sweep: values and gradients at a shared end are taken once.
    """

    def __init__(self, queries: Queries, segment: Segment, neighbour: RowStep | None = None) -> None:
        if neighbour is not None and neighbour.segment.buffers is not segment.buffers:
            neighbour = None  # another network, as far as values and gradients are concerned
        self.queries: Queries = queries.under(segment.buffers)
        self.segment: Segment = segment
        delta = segment.displacement
        self.squared_length = float(delta @ delta)
        self.rounding = torch.finfo(queries.function.dtype).eps
        self.scale = torch.ones(len(queries), dtype=torch.float64) if queries.scale is None else queries.scale
        self._known: dict[int, Tensor] = dict(neighbour._ends) if neighbour is not None else {}
        self._values: dict[int, Tensor] = dict(neighbour._values) if neighbour is not None else {}
        self._ends: dict[int, Tensor] = {}
        self._values = {id(end): self._value(end) for end in (segment.start, segment.end)}
        self.start_value, self.end_value = self._values[id(segment.start)], self._values[id(segment.end)]
        self._prepare(delta)

    def _prepare(self, delta: Tensor) -> None:
        self.change = self.displacement = delta

    def _value(self, theta: Tensor) -> Tensor:
        known = self._values.get(id(theta))
        return self.queries.values(theta) if known is None else known

    def _evaluate(self, theta: Tensor) -> Tensor:
        return self.queries.rows(theta)

    def gradient(self, time: float) -> Tensor:
        """∇h at start + time·Δ, (Q, D)."""
        if time not in (0.0, 1.0):
            theta = self.segment.start.double() + time * self.segment.displacement
            return self._evaluate(theta)
        end = self.segment.end if time else self.segment.start
        if id(end) not in self._ends:
            known = self._known.get(id(end))
            self._ends[id(end)] = self._evaluate(end) if known is None else known
        return self._ends[id(end)]

    def value_and_gradient_at(self, times: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gradients of some queries at times of their own."""
        return self.queries.rows_at(self.segment, times, queries)


class ProductStep(RowStep):
    """One segment with gradients as their products with D directions.

    Parameters
    ----------
    directions
        (D, P); Δ is put before them.
    """

    def __init__(self, queries: Queries, segment: Segment, directions: Tensor, neighbour: Any = None) -> None:
        self.directions = torch.cat([segment.displacement[None], directions])
        super().__init__(queries, segment, neighbour)
        self._known = {}  # products at a shared end are with this segment's own directions

    def _prepare(self, delta: Tensor) -> None:
        self.displacement = self.directions @ delta
        self.change = torch.zeros_like(self.displacement)
        self.change[0] = 1.0

    def _evaluate(self, theta: Tensor) -> Tensor:
        return self.queries.products(theta, self.directions)

    def value_and_gradient_at(self, times: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Values and products of some queries at times of their own."""
        return self.queries.products_at(self.segment, times, queries, self.directions)


def one_hot_context(indices: Tensor, outputs: int) -> Tensor:
    """Context that selects one output for each sample: h(z, c) = z·c."""
    return torch.nn.functional.one_hot(indices.to(torch.int64), outputs)


