"""Query outputs as functions of θ, and one training step as a quadrature sees it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pathkernel._typing import Float, Int, PyTree
from pathkernel.gradients.factored import FactoredGradients, accumulation_dtype, row_memory
from pathkernel.gradients.forward_derivatives import REFUSALS, push_forward
from pathkernel.gradients.gradient_source import ROWS, GradientSource, values_at_points
from pathkernel.gradients.per_sample import OutputFunctional, gradients_along, values_of
from pathkernel.gradients.pytrees import blocks, count, take
from pathkernel.runtime.interrupts import result_or_error
from pathkernel.runtime.workspace import Workspace, give_back_freed_memory
from pathkernel.trajectory.step import Segment

LONG_PASS = 10_000_000
"""Samples times parameters from which on a forward pass takes longer than its calls on the CPU: several as one then
gain nothing, and lose the cache. Measured on an MLP of 85,000 parameters: 360 samples at 8 points take 1.0 to 1.3 ms a
point together and 0.75 one by one (one thread of an AMD EPYC)."""


class Queries:
    """Q scalar functions of θ: K components of h(f(θ, x_j), context_j) for each of n samples, Q = n·K.

    Parameters
    ----------
    source
        The network, and how its gradients are taken.
    inputs, context
        n samples and what h needs of each of them.
    functional
        h, returning a scalar (then K = 1) or (K,).
    components
        K, or None for a scalar h.

    Notes
    -----
    ``scale`` is what a curve's errors are relative to, (Q,), once a curve has been laid through them. ``passes`` is how
    many samples go through the network at once, ``forward`` how many without a graph; None for all. Gradients taken in
    several passes are rows.

    Query q is component ``q % K`` of sample ``q // K``. Values are returned in float64.
    """

    def __init__(
        self,
        source: GradientSource,
        inputs: PyTree,
        functional: OutputFunctional,
        context: PyTree,
        components: int | None,
    ) -> None:
        self.source, self.function, self.functional = source, source.function, functional
        self.inputs, self.context = inputs, context
        self.scalar, self.components = components is None, components or 1
        self.scale: Tensor | None = None
        self.passes: int | None = None
        self.forward: int | None = None

    def __len__(self) -> int:
        return count(self.inputs) * self.components

    def under(self, buffers: Mapping[str, Tensor]) -> Queries:
        """The same queries with some of the network's buffers replaced."""
        if not buffers:
            return self
        other = copy.copy(self)
        other.function = self.function.with_(constants=buffers)
        return other

    def block(self, piece: slice | Tensor) -> Queries:
        """The queries of some of the samples."""
        other = copy.copy(self)
        other.inputs, other.context = take(self.inputs, piece), take(self.context, piece)
        if self.scale is not None:
            other.scale = take(self.scale.reshape(-1, self.components), piece).reshape(-1)
        return other

    def values(self, theta: Float[Tensor, " P"]) -> Float[Tensor, " Q"]:
        """h at θ."""
        point = self.function.cast(theta)
        with self.function.evaluating(gradients=False, fused_attention=True):
            values = (self._values(point, own.inputs, own.context) for own in self._cut(self.forward))
            return _joined([own.double().reshape(-1) for own in values])

    def _cut(self, samples: int | None) -> Iterator[Queries]:
        """The queries of so many samples at a time."""
        if samples is None or samples >= count(self.inputs):
            yield self
            return
        for piece in blocks(count(self.inputs), samples):
            yield self.block(piece)
            give_back_freed_memory()

    def _values(self, theta: Tensor, inputs: PyTree, context: PyTree) -> Tensor:
        outputs = self.function.batch(self.function.layout.unflatten(theta), self.function.cast(inputs))
        return values_of(self.functional, outputs, self.function.cast(context))

    @property
    def _context(self) -> PyTree:
        return self.function.cast(self.context)

    @property
    def _components(self) -> int | None:
        return None if self.scalar else self.components

    def gradients(self, theta: Float[Tensor, " P"], along: Float[Tensor, " P"] | None = None) -> FactoredGradients:
        """∇h at θ; where rows are formed, with their products with a direction at hand."""
        layout, function = self.function.layout, self.function
        if self.passes is None or self.passes >= count(self.inputs):
            context, components = self._context, self._components
            found = self.source.gradients(theta, self.inputs, self.functional, context, components, function)
            return found if self.passes is None else found.formed(self.source.workspace, along)
        dtype, begin = accumulation_dtype(function.dtype), 0
        # Given back after the step: where queries are taken in passes, the budget has no room for what is kept.
        rows = row_memory(layout, len(self), dtype, function.device, Workspace(0))
        for own in self._cut(self.passes):
            found = self.source.gradients(theta, own.inputs, self.functional, own._context, self._components, function)
            found.write({name: every[begin : begin + len(found)] for name, every in rows.items()})
            begin += len(found)
        return FactoredGradients.of_rows(rows, layout)

    def values_at_points(self, thetas: Sequence[Float[Tensor, " P"]]) -> Float[Tensor, "k Q"] | None:
        """h at several θ at once; None where they are to be taken one by one."""
        function = self.function
        if self.forward is not None:
            return None
        points = function.cast(torch.stack(tuple(thetas)))
        long = function.device.type == "cpu" and count(self.inputs) * function.layout.size > LONG_PASS
        asked = points, self.inputs, self.functional, self._context, function
        with torch.no_grad():
            found = self.source.values_at_points(*asked, together=not long)
        if found is None and long:
            inputs = function.cast(self.inputs)
            with function.evaluating(gradients=False, fused_attention=True):
                outputs = torch.stack([function.batch(function.parameters(theta), inputs) for theta in thetas])
                return values_at_points(self.functional, outputs, self._context).double().flatten(1)
        return None if found is None else found.double().flatten(1)

    def gradients_at_points(self, thetas: Float[Tensor, "k P"]) -> list[FactoredGradients] | None:
        """∇h at several θ in one pass; None as above."""
        if self.passes is not None:
            return None
        context, components = self._context, self._components
        return self.source.gradients_at_points(thetas, self.inputs, self.functional, context, components, self.function)

    def _single(self, queries: Int[Tensor, " n"]) -> tuple[OutputFunctional, PyTree, PyTree]:
        """The given queries as scalar functionals with their inputs and context."""
        samples = queries // self.components
        inputs, context = take(self.inputs, samples), self.function.cast(take(self.context, samples))
        if self.scalar:
            return self.functional, inputs, context
        chosen = torch.nn.functional.one_hot(queries % self.components, self.components).to(self.function.dtype)
        return (lambda z, c: self.functional(z, c[0]) @ c[1]), inputs, (context, chosen)

    def rows_at(self, segment: Segment, times: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Values (n,) and gradients (n, P) of some queries, each at its own time of a segment."""
        functional, inputs, context = self._single(queries)
        pieces = []
        for piece in self._rows_at_once(len(queries)):
            give_back_freed_memory()
            pieces.append(
                gradients_along(
                    self.function,
                    segment.start,
                    segment.displacement,
                    times[piece],
                    take(inputs, piece),
                    functional,
                    take(context, piece),
                )
            )
        return torch.cat([v for v, _ in pieces]).double(), torch.cat([g for _, g in pieces]).double()

    def _rows_at_once(self, queries: int) -> Iterator[slice]:
        per_query = 6 * self.function.layout.size * torch.finfo(self.function.dtype).bits // 8
        return blocks(queries, min(ROWS // per_query, queries if self.forward is None else self.forward))

    def products(self, theta: Float[Tensor, " P"], directions: Float[Tensor, "D P"]) -> Float[Tensor, "Q D"]:
        """∇h·v at θ for a few directions, by forward differentiation; by gradients where it has no rule."""
        return _joined([own._products(theta, directions) for own in self._cut(self.forward)])

    def _products(self, theta: Tensor, directions: Tensor) -> Tensor:
        point = self.function.cast(theta)

        def along(direction: Tensor) -> Tensor:
            return push_forward(lambda t: self._values(t, self.inputs, self.context), point, direction)

        def all_along() -> list[Tensor]:
            with self.function.evaluating(gradients=False), self.function.kept():
                return [along(direction.to(point)).double().reshape(-1) for direction in directions]

        columns = result_or_error(all_along, REFUSALS)
        if isinstance(columns, Exception):  # not every network can be differentiated forward, or twice backward
            few = blocks(count(self.inputs), 64)
            return torch.cat([self.block(piece).gradients(theta) @ directions.T for piece in few])
        return torch.stack(columns, dim=1)

    def products_at(
        self, segment: Segment, times: Tensor, queries: Tensor, directions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Values (n,) and products (n, D) of some queries, each at its own time of a segment."""
        found = []
        for piece in self._rows_at_once(len(queries)):
            values, rows = self.rows_at(segment, times[piece], queries[piece])
            found.append((values, rows @ directions.T))
        return torch.cat([v for v, _ in found]), torch.cat([products for _, products in found])


@runtime_checkable
class Together(Protocol):
    """Segments that are evaluated in one pass; None where that was not proved."""

    def displacement(self, segment: Segment) -> Float[Tensor, " P"]:
        """Δ of one of the segments, float64."""

    def value(self, theta: Float[Tensor, " P"]) -> Float[Tensor, " Q"] | None:
        """Values at a point."""

    def gradient(self, segment: Segment, time: float) -> FactoredGradients | None:
        """Gradients between the ends of one of the segments."""


class GradientStep:
    """Segment with gradients in factored form; see `pathkernel.quadrature.QueryStep`.

    Parameters
    ----------
    queries, segment
        Whose gradients, and where.
    neighbour
        The segment's neighbour in the sweep: values and gradients at a shared end are taken once.
    together
        Segments that it is evaluated with.
    """

    def __init__(
        self,
        queries: Queries,
        segment: Segment,
        neighbour: GradientStep | None = None,
        together: Together | None = None,
    ) -> None:
        if neighbour is not None and neighbour.segment.buffers is not segment.buffers:
            neighbour = None  # another network, as far as values and gradients are concerned
        self.queries: Queries = queries.under(segment.buffers)
        self.segment: Segment = segment
        self._together = together
        self.delta = segment.displacement if together is None else together.displacement(segment)
        self.rounding = torch.finfo(queries.function.dtype).eps
        self._known: dict[int, Any] = dict(neighbour._ends) if neighbour is not None else {}
        self._values: dict[int, Tensor] = dict(neighbour._values) if neighbour is not None else {}
        self._ends: dict[int, Any] = {}
        self._values = {id(end): self._value(end) for end in (segment.start, segment.end)}
        self.start_value, self.end_value = self._values[id(segment.start)], self._values[id(segment.end)]
        scale = torch.ones_like(self.start_value) if queries.scale is None else queries.scale
        self.scale = scale.to(self.start_value.device)
        self.change = self._change()

    @cached_property
    def squared_length(self) -> float:
        """‖Δ_s‖², read where a quadrature asks for it: on a device it is a synchronisation."""
        return float(self.delta @ self.delta)

    def _change(self) -> Tensor:
        return self.delta

    def _value(self, theta: Tensor) -> Tensor:
        known = self._values.get(id(theta))
        if known is None and self._together is not None:
            known = self._together.value(theta)
        return self.queries.values(theta) if known is None else known

    def _evaluate(self, theta: Tensor) -> Any:
        return self.queries.gradients(theta, self.delta)

    def gradient(self, time: float) -> Any:
        """∇h at start + time·Δ."""
        if time not in (0.0, 1.0):
            found = None if self._together is None else self._together.gradient(self.segment, time)
            if found is not None:
                return found
            return self._evaluate(self.segment.point(time, self.delta))
        end = self.segment.end if time else self.segment.start
        if id(end) not in self._ends:
            known = self._known.get(id(end))
            self._ends[id(end)] = self._evaluate(end) if known is None else known
        return self._ends[id(end)]

    def value(self, time: float) -> Tensor:
        """h at start + time·Δ, (Q,)."""
        return self.queries.values(self.segment.point(time, self.delta))

    def of(self, samples: Tensor) -> GradientStep:
        """The same step as some of the samples see it."""
        return GradientStep(self.queries.block(samples), self.segment)

    def rows_of(self, samples: Tensor) -> Tensor:
        """Rows of the queries of some of the samples."""
        components = self.queries.components
        return (samples[:, None] * components + torch.arange(components, device=samples.device)).reshape(-1)

    def plus_displacement(self, gradient: Any, multiples: Tensor) -> Any:
        """Gradients with a multiple of Δ added to each."""
        return gradient.plus(multiples, self.delta)

    def value_and_gradient_at(self, times: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gradients of some queries at times of their own."""
        return self.queries.rows_at(self.segment, times, queries)


class Rests:
    """Displacements beside multiples of the steps' own, (P,) each, until queries are pushed along it.

    A rest below the rounding of θ is gathered with those of the next few steps: the gradient of f is another there by
    as much as these steps change it, which is a trifle of a rounding.

    Parameters
    ----------
    rounding
        Of the numbers of θ, relative.
    steps
        How many rests are gathered.
    """

    def __init__(self, rounding: float, steps: int = 8) -> None:
        self.rounding = rounding
        self.steps = steps
        self.held: Tensor | None = None
        self._count = 0

    def due(self, rest: Float[Tensor, "D P"], theta: Tensor) -> Float[Tensor, "D P"] | None:
        """Directions along which queries are pushed now, with those that were gathered before in the first; or None."""
        rest[0] += 0.0 if self.held is None else self.held
        self._count += 1
        small = len(rest) == 1 and rest.norm() <= self._count * self.rounding * theta.norm()
        if small and self._count < self.steps:
            self.held = rest[0]
            return None
        self.held, self._count = None, 0
        return rest


class ProductStep(GradientStep):
    """Segment with gradients as their products with D directions.

    Parameters
    ----------
    directions
        (D, P); Δ is put before them.
    rests
        Given where the quadrature adds the multiple of Δ to each gradient that meets the change of f. Then the product
        with Δ is that change, and of a direction v = c Δ + w only w is pushed: q·v = c (f_1 − f_0) + ∇f·w.
    """

    def __init__(
        self,
        queries: Queries,
        segment: Segment,
        directions: Tensor,
        neighbour: Any = None,
        rests: Rests | None = None,
    ) -> None:
        self.directions = torch.cat([segment.displacement[None], directions])
        self.rests = rests
        super().__init__(queries, segment, neighbour)
        self._known = {}  # products at a shared end are with this segment's own directions

    @cached_property
    def _along(self) -> Tensor:
        return self.directions @ self.delta

    def _change(self) -> Tensor:
        change = torch.zeros(len(self.directions), dtype=torch.float64, device=self.directions.device)
        change[0] = 1.0
        return change

    def plus_displacement(self, gradient: Any, multiples: Tensor) -> Any:
        """Products with a multiple of those of Δ itself added to each."""
        return torch.addr(gradient, multiples, self._along)

    def _evaluate(self, theta: Tensor) -> Tensor:
        if self.rests is None or self.squared_length == 0:
            return self.queries.products(theta, self.directions)
        multiples = self._along / self.squared_length
        multiples[0] = 1.0
        rest = self.rests.due(torch.addr(self.directions[1:], multiples[1:], self.delta, alpha=-1), theta)
        products = torch.outer(self.end_value - self.start_value, multiples)
        if rest is not None:
            products[:, 1:] += self.queries.products(theta, rest)
        return products

    def value_and_gradient_at(self, times: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Values and products of some queries at times of their own."""
        return self.queries.products_at(self.segment, times, queries, self.directions)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def one_hot_context(indices: Tensor, outputs: int) -> Tensor:
    """Context that selects one output for each sample: h(z, c) = z·c."""
    return torch.nn.functional.one_hot(indices.to(torch.int64), outputs)
