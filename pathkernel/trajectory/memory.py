"""Steps kept in memory."""

from __future__ import annotations

from collections.abc import Callable

from pathkernel.trajectory.step import Step


class MemoryStore:
    """The store contract in its plainest form: append, read, length, flush."""

    def __init__(self) -> None:
        self._steps: list[Step] = []

    def append(self, step: Step) -> None:
        """Put a step behind the others."""
        self._steps.append(step)

    def read(self, index: int) -> Step:
        """The step with this index."""
        return self._steps[index]

    def rewrite(self, change: Callable[[Step], Step]) -> None:
        """Replace every step by what ``change`` makes of it."""
        self._steps = [change(step) for step in self._steps]

    def __len__(self) -> int:
        return len(self._steps)

    def flush(self) -> None:
        """Nothing waits to be written."""
