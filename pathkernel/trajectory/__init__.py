"""The path of a training run as values: what each optimizer step leaves on record, and how it is read back.

What the author of a store needs is importable from here, see `Store`.
"""

from pathkernel.runtime.lazy import lazy_names

_HOMES = {
    "Every": "trajectory.schedule",
    "Keyframes": "trajectory.schedule",
    "MemoryStore": "trajectory.memory",
    "MicroBatch": "trajectory.step",
    "Nothing": "trajectory.schedule",
    "Schedule": "trajectory.schedule",
    "Segment": "trajectory.step",
    "Step": "trajectory.step",
    "StepObserver": "trajectory.schedule",
    "Store": "trajectory.store",
    "Trajectory": "trajectory.trajectory",
    "WeightsOnly": "trajectory.schedule",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
