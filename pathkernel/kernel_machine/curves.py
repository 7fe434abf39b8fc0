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
from typing import ClassVar

import torch
from torch import Tensor

from pathkernel.gradients.factored import FactoredGradients, accumulation_dtype
from pathkernel.kernel_machine.accumulator import Account
from pathkernel.kernel_machine.queries import GradientStep, ProductStep, Queries
from pathkernel.quadrature import Quadrature
from pathkernel.trajectory.averages import AverageRecord, Update, averaged_events
from pathkernel.trajectory.step import Segment
from pathkernel.trajectory.trajectory import Trajectory

CHORD_PIECES = 32
"""Pieces of the chord: with the quadrature on each, as fine as a few dozen steps whatever the length of the run."""

Displacements = Callable[[Segment], Mapping[str, Tensor]]
"""Splits the displacement of a segment by channel, (P,) each; called once for each segment, in their order."""


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
            self.queries.scale = (self.final() - self.initial()).abs() / max(1, len(trajectory))

    @abstractmethod
    def initial(self) -> Tensor:
        """Values of the queries where the curve begins, (Q,)."""

    @abstractmethod
    def final(self) -> Tensor:
        """Values of the queries where it ends, (Q,)."""

    @abstractmethod
    def backward(self, account: Account) -> Iterator[tuple[Segment, FactoredGradients]]:
        """Segments of the recorded path from its end, each with its weight q."""

    dense: ClassVar[int] = 0
    """Matrices (Q, P) that a backward sweep of the curve holds."""

    @abstractmethod
    def forward(self, account: Account, displacements: Displacements) -> None:
        """Add what each channel's displacements did to the queries."""

    def _average(self, account: Account, view: GradientStep) -> FactoredGradients:
        """The query gradients averaged over a segment, with error and cost booked."""
        gradient = account.book(self.quadrature.average(view))
        if isinstance(gradient, Tensor):  # a quadrature that treats each query by itself
            return FactoredGradients.dense(gradient, self.trajectory.layout)
        assert isinstance(gradient, FactoredGradients)
        return gradient

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

    def initial(self) -> Tensor:
        """Values at its beginning."""
        return self.queries.values(self.trajectory.initial)

    def final(self) -> Tensor:
        """Values at its end."""
        return self.queries.under(self.trajectory.final_buffers).values(self.trajectory.final)

    def backward(self, account: Account) -> Iterator[tuple[Segment, FactoredGradients]]:
        """See `Curve.backward`."""
        view: GradientStep | None = None
        for segment in self.trajectory.segments(reverse=True):
            later, view = view, GradientStep(self.queries, segment, view)
            self._book_buffers(account, view, later)
            del later  # not beside its neighbour while that is used
            yield segment, self._average(account, view)
        self._book_first_buffers(account, view)

    def forward(self, account: Account, displacements: Displacements) -> None:
        """See `Curve.forward`."""
        view: ProductStep | None = None
        for segment in self.trajectory.segments():
            directions = displacements(segment)
            earlier, view = view, ProductStep(self.queries, segment, torch.stack(list(directions.values())), view)
            if earlier is None:
                self._book_first_buffers(account, view)
            else:
                self._book_buffers(account, earlier, view)
            products = account.book(self.quadrature.average(view))
            for column, name in enumerate(directions, start=1):
                account.channels[name] += products[:, column]
        if view is not None:
            self._book_buffers(account, view, None)

    def _book_buffers(self, account: Account, view: GradientStep, later: GradientStep | None) -> None:
        """What a change of buffers (running statistics) did to f between a segment and the one after it."""
        buffers = self.trajectory.final_buffers if later is None else later.segment.buffers
        if buffers is not view.segment.buffers:
            after = self.queries.under(buffers).values(view.segment.end) if later is None else later.start_value
            account.channels["buffers"] += after - view.end_value

    def _book_first_buffers(self, account: Account, first: GradientStep | None) -> None:
        if first is not None and first.segment.buffers:
            account.channels["buffers"] += first.start_value - account.channels["initial"]


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

    def __init__(
        self, trajectory: Trajectory, queries: Queries, quadrature: Quadrature, record: AverageRecord
    ) -> None:
        self.record = record
        super().__init__(trajectory, queries.under(record.constants(trajectory)), quadrature)
        self.events = averaged_events(trajectory, record)

    def initial(self) -> Tensor:
        """Values at its beginning."""
        return self.queries.values(self.trajectory.layout.flatten(self.record.initial))

    def final(self) -> Tensor:
        """Values at its end."""
        return self.queries.values(self.trajectory.layout.flatten(self.record.last))

    @property
    def _first_gap(self) -> Tensor:
        start = self.trajectory.layout.flatten(self.record.initial, torch.float64)
        return self.trajectory.initial.double() - start

    def backward(self, account: Account) -> Iterator[tuple[Segment, FactoredGradients]]:
        """See `Curve.backward`."""
        weight, layout = self._no_weight(), self.trajectory.layout
        view: GradientStep | None = None
        for event in reversed(self.events):
            if isinstance(event, Segment):
                yield event, FactoredGradients.dense(weight, layout)
                continue
            view = GradientStep(self.queries, event.segment, view)
            average = self._average(account, view)
            if event.segment.channel:
                account.channels[event.segment.channel] += average @ event.segment.displacement
            else:
                weight.mul_(1 - event.a)
                self._add(weight, average, event.a)
        if self._first_gap.any():
            account.channels["average"] += FactoredGradients.dense(weight, layout) @ self._first_gap

    def forward(self, account: Account, displacements: Displacements) -> None:
        """See `Curve.forward`."""
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
            view = self._move(account, event, gaps, view)

    def _move(
        self, account: Account, event: Update, gaps: dict[str, Tensor], view: ProductStep | None
    ) -> ProductStep:
        directions = {name: event.a * gap for name, gap in gaps.items()}
        if event.segment.channel:
            directions = {event.segment.channel: event.segment.displacement}
        view = ProductStep(self.queries, event.segment, torch.stack(list(directions.values())), view)
        products = account.book(self.quadrature.average(view))
        for column, name in enumerate(directions, start=1):
            account.channels[name] += products[:, column]
        for name in gaps:
            gaps[name] = (1 - event.a) * gaps[name]
        return view


class ChordCurve(Curve):
    """The straight line θ_0 → θ_S: every displacement has the same weight, and nodes are taken once, not per step."""

    dense = 1

    def initial(self) -> Tensor:
        """Values at its beginning."""
        return self.queries.values(self.trajectory.initial)

    def final(self) -> Tensor:
        """Values at its end."""
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

    def _book_buffers(self, account: Account) -> None:
        if self.trajectory.final_buffers:
            changed = self._trained.values(self.trajectory.initial)
            account.channels["buffers"] += changed - account.channels["initial"]

    def backward(self, account: Account) -> Iterator[tuple[Segment, FactoredGradients]]:
        """See `Curve.backward`."""
        self._book_buffers(account)
        view: GradientStep | None = None
        weight = self._no_weight()
        for piece in self._pieces():
            view = GradientStep(self._trained, piece, view)
            self._add(weight, self._average(account, view), 1 / CHORD_PIECES)
        for segment in self.trajectory.segments(reverse=True):
            yield segment, FactoredGradients.dense(weight, self.trajectory.layout)

    def forward(self, account: Account, displacements: Displacements) -> None:
        """See `Curve.forward`."""
        self._book_buffers(account)
        size = self.trajectory.layout.size
        zeros = torch.zeros(size, dtype=torch.float64, device=self.trajectory.device)
        moved: dict[str, Tensor] = defaultdict(lambda: zeros)
        for segment in self.trajectory.segments():
            for name, displacement in displacements(segment).items():
                moved[name] = moved[name] + displacement
        directions = torch.stack(list(moved.values()))
        view: ProductStep | None = None
        for piece in self._pieces():
            view = ProductStep(self._trained, piece, directions, view)
            products = account.book(self.quadrature.average(view)) / CHORD_PIECES
            for column, name in enumerate(moved, start=1):
                account.channels[name] += products[:, column]
