"""Consecutive segments of a path whose queries are evaluated together: small networks take the time of their calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from pathkernel._typing import Float
from pathkernel.gradients.factored import FactoredGradients
from pathkernel.gradients.layers.stacked_pieces import Directions
from pathkernel.kernel_machine.queries import Queries
from pathkernel.trajectory.step import Segment


class StackedSegments:
    """k segments under the same buffers, as their queries see them.

    Values are taken where the segments start, gradients between their ends: all k when the first is asked for.

    Parameters
    ----------
    queries
        Under the buffers of the segments.
    segments
        In any order.
    """

    def __init__(self, queries: Queries, segments: Sequence[Segment]) -> None:
        self.queries = queries
        self.segments = tuple(segments)
        self._gradients: dict[float, list[FactoredGradients] | None] = {}

    def value(self, theta: Float[Tensor, " P"]) -> Float[Tensor, " Q"] | None:
        """Values at the start of a segment; None at other points, and where passes are taken one by one."""
        for place, segment in enumerate(self.segments):
            if segment.start is theta:
                return None if self._values is None else self._values[place]
        return None

    @cached_property
    def _values(self) -> Float[Tensor, "k Q"] | None:
        return self.queries.values_at_points([segment.start for segment in self.segments])

    @cached_property
    def _displacements(self) -> Directions:
        """Δ of each segment, float64: exact for float32 parameters."""
        first = self.segments[0].start
        matrix = first.new_empty(len(self.segments), len(first), dtype=torch.float64)
        # Row by row: what is converted on the way stays in cache. Neighbours share a point, which is converted once.
        before: tuple[Tensor, Tensor] | None = None
        for row, segment in zip(matrix, self.segments, strict=True):
            end = before[1] if before is not None and before[0] is segment.end else segment.end.double()
            before = segment.start, segment.start.double()
            torch.sub(end, before[1], out=row)
        return Directions(matrix)

    def _points(self, time: float) -> Float[Tensor, "k P"]:
        """start + time · Δ of each segment, in the type that passes are run in."""
        function, displacements = self.queries.function, self._displacements
        points = displacements.matrix.new_empty(displacements.matrix.shape, dtype=function.dtype)
        if {self.segments[0].start.dtype, function.dtype} == {torch.float32}:
            # A rounding of Δ is a trifle of the rounding of the point itself.
            for row, segment, delta in zip(points, self.segments, displacements.to(torch.float32), strict=True):
                torch.add(segment.start, delta, alpha=time, out=row)
            return points
        for row, segment, delta in zip(points, self.segments, displacements.rows, strict=True):
            row.copy_(torch.add(segment.start.double(), delta, alpha=time))
        return points

    def displacement(self, segment: Segment) -> Float[Tensor, " P"]:
        """Δ of one of the segments: by this very tensor the products with it are found that are taken of all."""
        return self._displacements.rows[self._place(segment)]

    def gradient(self, segment: Segment, time: float) -> FactoredGradients | None:
        """∇h at start + time · Δ of one of the segments; None where passes are taken one by one."""
        if time not in self._gradients:
            self._gradients[time] = found = self.queries.gradients_at_points(self._points(time))
            for stack, _ in (own.stack for own in (found or ())[:1] if own.stack is not None):
                stack.meet(self._displacements)
        found = self._gradients[time]
        return None if found is None else found[self._place(segment)]

    def _place(self, segment: Segment) -> int:
        return next(place for place, own in enumerate(self.segments) if own is segment)


def stacked(
    queries: Queries, segments: Iterable[Segment], count: int
) -> Iterator[tuple[Segment, StackedSegments | None]]:
    """Segments with those that each is evaluated with; None for one by itself.

    Exactly ``count`` are taken together, so that one number is proved. The last ones are taken by themselves, that the
    value where the path ends is the one that stands for the curve's own.
    """
    if count < 2:
        for segment in segments:
            yield segment, None
        return
    ahead: deque[Segment] = deque()
    for segment in segments:
        if ahead and segment.buffers is not ahead[0].buffers:
            yield from _by_themselves(ahead)
        ahead.append(segment)
        if len(ahead) > count:
            own = [ahead.popleft() for _ in range(count)]
            together = StackedSegments(queries.under(own[0].buffers), own)
            yield from ((one, together) for one in own)
    yield from _by_themselves(ahead)


def _by_themselves(segments: deque[Segment]) -> Iterator[tuple[Segment, StackedSegments | None]]:
    while segments:
        yield segments.popleft(), None
