"""The path of a training run as values: what each optimizer step leaves on record, and how it is read back.

What the author of a store needs is importable from here, see `Store`.
"""

from typing import TYPE_CHECKING

from pathkernel.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from pathkernel.trajectory.memory import MemoryStore as MemoryStore
    from pathkernel.trajectory.observer import StepObserver as StepObserver
    from pathkernel.trajectory.schedule import Every as Every
    from pathkernel.trajectory.schedule import Keyframes as Keyframes
    from pathkernel.trajectory.schedule import Nothing as Nothing
    from pathkernel.trajectory.schedule import Schedule as Schedule
    from pathkernel.trajectory.schedule import WeightsOnly as WeightsOnly
    from pathkernel.trajectory.step import MicroBatch as MicroBatch
    from pathkernel.trajectory.step import Segment as Segment
    from pathkernel.trajectory.step import Step as Step
    from pathkernel.trajectory.store import Store as Store
    from pathkernel.trajectory.trajectory import Trajectory as Trajectory

_HOMES = {
    "Every": "trajectory.schedule",
    "Keyframes": "trajectory.schedule",
    "MemoryStore": "trajectory.memory",
    "MicroBatch": "trajectory.step",
    "Nothing": "trajectory.schedule",
    "Schedule": "trajectory.schedule",
    "Segment": "trajectory.step",
    "Step": "trajectory.step",
    "StepObserver": "trajectory.observer",
    "Store": "trajectory.store",
    "Trajectory": "trajectory.trajectory",
    "WeightsOnly": "trajectory.schedule",
}

__all__ = sorted(_HOMES)
if not TYPE_CHECKING:  # to which it would say that there is every name
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
