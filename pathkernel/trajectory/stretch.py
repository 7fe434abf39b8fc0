"""One step of a path as a path of its own: what is computed while a run is still going on, or before it begins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from pathkernel.trajectory.memory import MemoryStore
from pathkernel.trajectory.step import Step
from pathkernel.trajectory.trajectory import Trajectory


class Stretch(Trajectory):
    """One step of a path that is still being walked: the live model is not compared with its end."""

    largest: Step | None = None
    """The step with the largest gradient so far."""

    def require_steps(self, asker: str) -> None:
        """Nothing to refuse."""

    def steps(self) -> Iterator[Step]:
        """The step, and the one by whose gradient the rounding of all is judged."""
        yield from super().steps()
        if self.largest is not None:
            yield self.largest


def stretch(trajectory: Trajectory, start: Tensor, step: Step) -> Stretch:
    """One step of a path, from where the one before ended, with the running statistics that it found.

    The first begins with those of the untrained network.
    """
    found = step.buffers if step.index else {}
    store = MemoryStore()
    store.append(replace(step, index=0))
    return Stretch(
        trajectory.model,
        trajectory.objective,
        trajectory.data,
        trajectory.layout,
        start,
        {**trajectory.constants, **found},
        trajectory.rule,
        store=store,
        final_buffers=step.buffers,
        returns=trajectory.returns,
        task=trajectory.task,
    )
