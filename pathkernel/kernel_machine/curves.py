r"""Along which curve the gradient of a query is averaged, and how that weighs each displacement of the weights.

The path itself, the path of an averaged network, or the straight chord from start to end: each is joined from straight
pieces, on each of which a quadrature averages the query's gradient, and each gives every displacement Δ_s of the
recorded path a weight q_s with :math:`f_{end} - f_{start} = \sum_s q_s \cdot \Delta_s`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from pathkernel.errors import InputError
from pathkernel.gradients.factored import FactoredGradients, accumulation_dtype
from pathkernel.kernel_machine.accumulator import Accumulator
from pathkernel.kernel_machine.queries import GradientStep, ProductStep, Queries, Rests
from pathkernel.kernel_machine.stacked_segments import stacked
from pathkernel.quadrature import DiscreteGradient, Quadrature
from pathkernel.trajectory.averages import AverageRecord, Update, averaged_events
from pathkernel.trajectory.step import MeasuredSegment, Segment
from pathkernel.trajectory.trajectory import Trajectory

TOGETHER = "together"
"""Channel of a forward sweep for samples, sources and all changes that have a name."""

CHORD_PIECES = 32
"""Pieces of the chord: with the quadrature on each, as fine as a few dozen steps whatever the length of the run."""

Displacements = Callable[[Segment], Mapping[str, Tensor]]
"""Splits the displacement of a segment by channel, (P,) each; called once for each segment, in their order."""


def check_average(average: str | None, trajectory: Trajectory, form: str) -> None:
    """Refuse an average that is not on record, and one of a chord.

    Raises
    ------
    InputError
        With the averages that there are.
    """
    if average is not None and average not in trajectory.averages:
        raise InputError(
            f"`average={average!r}` was given",
            f"Averages on record are {', '.join(map(repr, trajectory.averages)) or 'none'}",
            'Record them with `KernelRecorder(..., averages={"ema": averaged_model})`',
        )
    if average is not None and form == "chord":
        raise InputError(
            '`form="chord"` was asked of an averaged network',
            "The chord joins the untrained network to the last weights",
            "Leave out `form` or `average`",
        )


class Curve(ABC):
    """A curve through parameter space that ends in the network to be explained.

    Parameters
    ----------
    trajectory
        The recorded path.
    queries
        Outputs to explain, under the constants of the untrained network.
    quadrature
        Used on each straight piece.
    """

    def __init__(self, trajectory: Trajectory, queries: Queries, quadrature: Quadrature) -> None:
        self.trajectory, self.queries, self.quadrature = trajectory, queries, quadrature
        if quadrature.relative:
            self.queries = copy.copy(queries)
            self.queries.scale = (self.final - self.initial).abs() / max(1, len(trajectory))

    def block(self, piece: slice | Tensor) -> Curve:
        """The same curve for the queries of some of the samples."""
        other = copy.copy(self)
        other.queries = self.queries.block(piece)
        if len(other.queries) != len(self.queries) or isinstance(piece, Tensor):
            for name in ("initial", "final"):  # taken anew: a network rounds otherwise in another batch
                vars(other).pop(name, None)
        return other

    @cached_property
    def initial(self) -> Tensor:
        """Values of the queries where the curve begins, (Q,)."""
        return self._value_at_start()

    @cached_property
    def final(self) -> Tensor:
        """Values of the queries where it ends, (Q,)."""
        return self._value_at_end()

    @abstractmethod
    def _value_at_start(self) -> Tensor: ...

    @abstractmethod
    def _value_at_end(self) -> Tensor: ...

    @abstractmethod
    def backward(self, accumulator: Accumulator) -> Iterator[tuple[Segment, FactoredGradients]]:
        """Segments of the recorded path from its end, each with its weight q."""

    dense: ClassVar[int] = 0
    """Matrices (Q, P) that a backward sweep of the curve holds."""

    stack: int = 1
    """How many segments a backward sweep evaluates together, where the curve can."""

    segments: Iterator[Segment] | None = None
    """Segments of the recorded path from its end, where they are read for several sweeps."""

    @abstractmethod
    def forward(self, accumulator: Accumulator, displacements: Displacements) -> None:
        """Add what each channel's displacements did to the queries."""

    def _average(self, accumulator: Accumulator, view: GradientStep) -> FactoredGradients:
        """The query gradients averaged over a segment, with error and cost booked."""
        return self._factored(accumulator.add(self.quadrature.average(view)))

    def average_on(self, segment: Segment) -> FactoredGradients:
        """The query gradients averaged over one segment, by itself, and nothing booked."""
        return self._factored(self.quadrature.average(GradientStep(self.queries, segment)).gradient)

    def _factored(self, gradient: Tensor | FactoredGradients) -> FactoredGradients:
        if isinstance(gradient, Tensor):  # a quadrature that treats each query by itself
            return FactoredGradients.dense(gradient, self.trajectory.layout)
        assert isinstance(gradient, FactoredGradients)
        return gradient

    def _rests(self, steps: int = 8) -> Rests | None:
        """Rests of the displacements of a forward sweep, where the quadrature meets each step."""
        rounding = torch.finfo(self.trajectory.precision).eps
        return Rests(rounding, steps) if isinstance(self.quadrature, DiscreteGradient) else None

    def _no_weight(self) -> Tensor:
        dtype = accumulation_dtype(self.queries.function.dtype)
        return torch.zeros(
            len(self.queries), self.trajectory.layout.size, dtype=dtype, device=self.queries.function.device
        )

    def _add(self, weight: Tensor, gradient: FactoredGradients, factor: float) -> None:
        """weight ← weight + factor · gradient, parameter by parameter."""
        for where in self.trajectory.layout.slices.values():
            weight[:, where].add_(gradient.columns(where, weight.dtype), alpha=factor)


class PathCurve(Curve):
    """The recorded path: each displacement is weighted by the query's gradient along itself."""

    def _value_at_start(self) -> Tensor:
        return self.queries.values(self.trajectory.initial)

    def _value_at_end(self) -> Tensor:
        return self.queries.under(self.trajectory.final_buffers).values(self.trajectory.final)

    def backward(self, accumulator: Accumulator) -> Iterator[tuple[Segment, FactoredGradients]]:
        """Walk back from the end of the curve; as of `Curve.backward`."""
        view: GradientStep | None = None
        segments = self.trajectory.segments(reverse=True) if self.segments is None else self.segments
        for segment, together in stacked(self.queries, segments, self.stack):
            later, view = view, GradientStep(self.queries, segment, view, together)
            self._book_buffers(accumulator, view, later)
            del later  # not beside its neighbour while that is used
            yield segment, self._average(accumulator, view)
        self._book_first_buffers(accumulator, view)

    def forward(self, accumulator: Accumulator, displacements: Displacements) -> None:
        """Walk forward along the curve; as of `Curve.forward`."""
        view: ProductStep | None = None
        rests = self._rests()
        for segment in map(MeasuredSegment.of, self.trajectory.segments()):
            directions = displacements(segment)
            along = _rows(directions, segment.displacement)
            earlier, view = view, ProductStep(self.queries, segment, along, view, rests)
            if earlier is None:
                self._book_first_buffers(accumulator, view)
            else:
                self._book_buffers(accumulator, earlier, view)
            products = accumulator.add(self.quadrature.average(view))
            for column, name in enumerate(directions, start=1):
                accumulator.channels[name] += products[:, column]
        if view is not None:
            self._book_buffers(accumulator, view, None)
            self._book_rests(accumulator, view)

    def _book_rests(self, accumulator: Accumulator, last: ProductStep) -> None:
        """Book what was gathered of the last steps of a forward sweep."""
        if last.rests is not None and last.rests.held is not None:
            products = last.queries.products(last.segment.end, last.rests.held[None])
            accumulator.channels[TOGETHER] += products[:, 0]

    def _book_buffers(self, accumulator: Accumulator, view: GradientStep, later: GradientStep | None) -> None:
        """Book the effect of a change of buffers (running statistics) on f between a segment and the one after it."""
        buffers = self.trajectory.final_buffers if later is None else later.segment.buffers
        if buffers is not view.segment.buffers and (buffers or view.segment.buffers):
            after = self.queries.under(buffers).values(view.segment.end) if later is None else later.start_value
            accumulator.channels["buffers"] += after - view.end_value

    def _book_first_buffers(self, accumulator: Accumulator, first: GradientStep | None) -> None:
        if first is not None and first.segment.buffers:
            accumulator.channels["buffers"] += first.start_value - accumulator.channels["initial"]


class AverageCurve(Curve):
    """The path of an averaged network, whose every move Θ → Θ + a (θ − Θ) passes part of the gap θ − Θ on.

    Going back, the weight of the gap is ε ← a q̄ + (1 − a) ε at each move of the average, and the weight of every
    displacement of θ is the ε of its moment: one linear filter more in the adjoint.

    Parameters
    ----------
    record
        The average.
    """

    dense = 1

    def __init__(self, trajectory: Trajectory, queries: Queries, quadrature: Quadrature, record: AverageRecord) -> None:
        self.record = record
        super().__init__(trajectory, queries.under(record.constants(trajectory.constants)), quadrature)
        self.events = averaged_events(trajectory.segments(), trajectory.layout, record)

    def _value_at_start(self) -> Tensor:
        return self.queries.values(self.trajectory.layout.flatten(self.record.initial))

    def _value_at_end(self) -> Tensor:
        return self.queries.values(self.trajectory.layout.flatten(self.record.last))

    @property
    def _first_gap(self) -> Tensor:
        start = self.trajectory.layout.flatten(self.record.initial, torch.float64)
        return self.trajectory.initial.double() - start

    def backward(self, accumulator: Accumulator) -> Iterator[tuple[Segment, FactoredGradients]]:
        """Walk back from the end of the curve; as of `Curve.backward`."""
        weight, layout = self._no_weight(), self.trajectory.layout
        view: GradientStep | None = None
        for event in reversed(self.events):
            if isinstance(event, Segment):
                yield event, FactoredGradients.dense(weight, layout)
                continue
            view = GradientStep(self.queries, event.segment, view)
            average = self._average(accumulator, view)
            if event.segment.channel:
                accumulator.channels[event.segment.channel] += average @ event.segment.displacement
            else:
                weight.mul_(1 - event.a)
                self._add(weight, average, event.a)
        if self._first_gap.any():
            accumulator.channels["average"] += FactoredGradients.dense(weight, layout) @ self._first_gap

    def forward(self, accumulator: Accumulator, displacements: Displacements) -> None:
        """Walk forward along the curve; as of `Curve.forward`."""
        size = self.trajectory.layout.size
        zeros = torch.zeros(size, dtype=torch.float64, device=self.trajectory.device)
        gaps: dict[str, Tensor] = defaultdict(lambda: zeros)
        if self._first_gap.any():
            gaps["average"] = self._first_gap
        view: ProductStep | None = None
        for event in self.events:
            if isinstance(event, Segment):
                for name, displacement in displacements(event).items():
                    gaps[name] = gaps[name] + displacement
                continue
            view = self._move(accumulator, event, gaps, view)

    def _move(
        self, accumulator: Accumulator, event: Update, gaps: dict[str, Tensor], view: ProductStep | None
    ) -> ProductStep:
        directions = {name: event.a * gap for name, gap in gaps.items()}
        if event.segment.channel:
            directions = {event.segment.channel: event.segment.displacement}
        along = _rows(directions, event.segment.displacement)
        view = ProductStep(self.queries, event.segment, along, view, self._rests(1))
        products = accumulator.add(self.quadrature.average(view))
        for column, name in enumerate(directions, start=1):
            accumulator.channels[name] += products[:, column]
        for name in gaps:
            gaps[name] = (1 - event.a) * gaps[name]
        return view


class ChordCurve(Curve):
    """The straight line θ_0 → θ_S: every displacement has the same weight, and nodes are taken once, not per step."""

    dense = 1

    def _value_at_start(self) -> Tensor:
        return self.queries.values(self.trajectory.initial)

    def _value_at_end(self) -> Tensor:
        return self._trained.values(self.trajectory.final)

    @property
    def _trained(self) -> Queries:
        return self.queries.under(self.trajectory.final_buffers)

    def _pieces(self) -> Iterator[Segment]:
        start, end = self.trajectory.initial.double(), self.trajectory.final.double()
        here = start + (end - start) * (0 / CHORD_PIECES)
        for piece in range(1, CHORD_PIECES + 1):
            there = start + (end - start) * (piece / CHORD_PIECES) if piece < CHORD_PIECES else end
            yield Segment(here, there, None)
            here = there

    def _book_buffers(self, accumulator: Accumulator) -> None:
        if self.trajectory.final_buffers:
            changed = self._trained.values(self.trajectory.initial)
            accumulator.channels["buffers"] += changed - accumulator.channels["initial"]

    def backward(self, accumulator: Accumulator) -> Iterator[tuple[Segment, FactoredGradients]]:
        """Walk back from the end of the curve; as of `Curve.backward`."""
        self._book_buffers(accumulator)
        view: GradientStep | None = None
        weight = self._no_weight()
        for piece in self._pieces():
            view = GradientStep(self._trained, piece, view)
            self._add(weight, self._average(accumulator, view), 1 / CHORD_PIECES)
        for segment in self.trajectory.segments(reverse=True):
            yield segment, FactoredGradients.dense(weight, self.trajectory.layout)

    def forward(self, accumulator: Accumulator, displacements: Displacements) -> None:
        """Walk forward along the curve; as of `Curve.forward`."""
        self._book_buffers(accumulator)
        size = self.trajectory.layout.size
        zeros = torch.zeros(size, dtype=torch.float64, device=self.trajectory.device)
        moved: dict[str, Tensor] = defaultdict(lambda: zeros)
        for segment in self.trajectory.segments():
            for name, displacement in displacements(segment).items():
                moved[name] = moved[name] + displacement
        directions = _rows(moved, zeros)
        view: ProductStep | None = None
        for piece in self._pieces():
            view = ProductStep(self._trained, piece, directions, view, self._rests(1))
            products = accumulator.add(self.quadrature.average(view)) / CHORD_PIECES
            for column, name in enumerate(moved, start=1):
                accumulator.channels[name] += products[:, column]


def _rows(directions: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """Displacements of channels, (D, P); none of a step whose gradients were all cleared."""
    return torch.stack(list(directions.values())) if directions else like.new_empty(0, len(like))


def curve_to(trajectory: Trajectory, queries: Queries, quadrature: Quadrature, average: str | None, form: str) -> Curve:
    """The curve that ends in the last weights or in an average on record: the path, or the chord of that form."""
    if average is not None:
        return AverageCurve(trajectory, queries, quadrature, trajectory.averages[average])
    return (ChordCurve if form == "chord" else PathCurve)(trajectory, queries, quadrature)
