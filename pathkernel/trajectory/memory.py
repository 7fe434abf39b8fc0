"""Steps kept in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from pathkernel.runtime.pickling import with_memory_of_their_own
from pathkernel.trajectory.run import Extension
from pathkernel.trajectory.step import Step
from pathkernel.trajectory.store import Store, padded


class MemoryStore(Store):
    """The store contract in its plainest form: a list."""

    def __init__(self, steps: Iterable[Step] = ()) -> None:
        self._steps = list(steps)

    def __getstate__(self) -> dict[str, Any]:
        return {"_steps": with_memory_of_their_own(self._steps)}

    def append(self, step: Step) -> None:
        """Put a step behind the others."""
        self._steps.append(step)

    def read(self, index: int) -> Step:
        """The step with this index."""
        return self._steps[index]

    def __len__(self) -> int:
        return len(self._steps)

    def until(self, length: int) -> MemoryStore:
        """The first steps alone, so many of them."""
        return MemoryStore(self._steps[:length])

    def extend(self, tail: Tensor, pad: Extension) -> None:
        """Lengthen every vector of every step."""
        self._steps = [padded(step, tail, pad) for step in self._steps]
