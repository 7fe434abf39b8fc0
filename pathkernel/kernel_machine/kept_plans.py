"""Plans that a kernel machine has measured, kept for the next call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pathkernel.kernel_machine.queries import Queries
from pathkernel.kernel_machine.query_selection import shapes_of
from pathkernel.runtime.workspace import give_back_freed_memory
from pathkernel.trajectory.batch_gradients import RecordedGradients

T = TypeVar("T")


class KeptPlans:
    """Plans by what they are for, for the recorded gradients that they were measured with."""

    def __init__(self) -> None:
        self._plans: tuple[RecordedGradients | None, dict[Any, Any]] = None, {}

    def of(self, kind: tuple[Any, ...], queries: Queries, recorded: RecordedGradients, measure: Callable[[], T]) -> T:
        """Plan for queries of this number and these shapes: measured by a few passes once, and kept."""
        key = (*kind, queries.components, queries.function.submodule, recorded.coupled, *shapes_of(queries.inputs))
        known, plans = self._plans
        if known is not recorded:
            plans = {}
        if key not in plans:
            plans[key] = measure()
            give_back_freed_memory()
        self._plans = recorded, plans
        return plans[key]
