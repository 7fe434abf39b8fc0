"""Displacements of the steps of a path as samples and channels make them, kept for further predictions."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pathkernel.kernel_machine.curves import Displacements
from pathkernel.trajectory.batch_gradients import RecordedGradients
from pathkernel.trajectory.step import Segment


class KeptDisplacements:
    """Table of Δ_s for all segments of a path, (S, P) float64 for each channel that stays apart.

    A forward sweep trains every step once more for it; with the table it takes a forward pass or two of the queries
    for each step, and the same bits result.

    Parameters
    ----------
    memory
        Bytes that it may take; a table that is larger is not kept.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self._of: RecordedGradients | None = None
        self._table: list[Mapping[str, Tensor]] = []
        self._whole = False
        self._bytes = 0

    def through(self, recorded: RecordedGradients, compute: Displacements) -> Displacements:
        """Function that a sweep through these gradients asks, segment by segment in their order."""
        if self._whole and self._of is recorded:
            table = iter(self._table)
            return lambda segment: next(table)
        self._of, self._table, self._whole, self._bytes = recorded, [], False, 0

        def kept(segment: Segment) -> Mapping[str, Tensor]:
            found = compute(segment)
            self._bytes += sum(moved.numel() * moved.element_size() for moved in found.values())
            if self._bytes <= self.memory:
                self._table.append(found)
            else:
                self._table.clear()
            return found

        return kept

    def finish(self) -> None:
        """Note that a sweep has come to its end."""
        self._whole = 0 < self._bytes <= self.memory
