"""Steps kept in memory."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pathkernel.trajectory.step import Step
from pathkernel.trajectory.store import Store, padded


class MemoryStore(Store):
    """The store contract in its plainest form: a list."""

    def __init__(self) -> None:
        self._steps: list[Step] = []

    def append(self, step: Step) -> None:
        """Put a step behind the others."""
        self._steps.append(step)

    def read(self, index: int) -> Step:
        """The step with this index."""
        return self._steps[index]

    def __len__(self) -> int:
        return len(self._steps)

    def extend(self, tail: Tensor, pad: Callable[[Tensor], Tensor]) -> None:
        """Lengthen every vector of every step."""
        self._steps = [padded(step, tail, pad) for step in self._steps]
