"""Observers of a recording: each is shown every step, whatever the others do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel.errors import RecordingError
from pathkernel.trajectory.observer import StepObserver
from pathkernel.trajectory.step import Step
from pathkernel.trajectory.trajectory import Trajectory


def show(step: Step, observers: Sequence[StepObserver], trajectory: Trajectory) -> None:
    """Show a step to all observers, and only then raise what one of them raised.

    Raises
    ------
    RecordingError
        Where an observer wrote on what it was shown, which is the record's and the other observers'.
    """
    raised: list[Exception] = []
    for observer in observers:
        before = _state(step, trajectory)
        try:
            observer.observe(step)
        except Exception as error:
            raised.append(error)
            observer.missed(step)
        after = _state(step, trajectory)
        changed = [name for name, value in before.items() if after.get(name) != value]
        if changed:
            raised.append(
                RecordingError(
                    f"{type(observer).__name__}.observe changed {', '.join(f'`{name}`' for name in changed)} of step "
                    f"{step.index} in place",
                    "What an observer is shown is the record's, and the other observers'",
                    "Work on a copy, such as `step.gradient.clone()`, and record again",
                )
            )
    if raised:
        first, *others = raised
        for other in others:
            first.add_note(f"Another observer: {type(other).__name__}: {other}")
        raise first


def _state(step: Step, trajectory: Trajectory) -> dict[str, Any]:
    """Marks by which writing on a step is noticed: how often each tensor was written on, and all settings."""
    versions = {
        name: tensor._version for name, tensor in _tensors(step, trajectory) if not tensor.is_inference()
    }  # an inference tensor does not count
    return {**versions, "hyperparameters": [dict(group) for group in step.hyperparameters]}


def _tensors(step: Step, trajectory: Trajectory) -> Iterator[tuple[str, Tensor]]:
    yield "initial", trajectory.initial
    for name in ("before", "after", "gradient"):
        yield name, getattr(step, name)
    for name, point in step.changes:
        yield f"changes: {name}", point
    for kind in ("gradient_changes", "buffers"):
        for name, value in getattr(step, kind).items():
            yield f"{kind}: {name}", value
    for place, batch in enumerate(step.batches):
        for field in fields(batch):
            for leaf in pytree.tree_leaves(getattr(batch, field.name)):
                if isinstance(leaf, Tensor):
                    yield f"batches[{place}].{field.name}", leaf
