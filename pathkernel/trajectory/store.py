"""Contract of every store: it keeps the steps of a trajectory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pathkernel.errors import TrajectoryError
from pathkernel.trajectory.run import End, Extension, Run
from pathkernel.trajectory.step import Step


@dataclass(frozen=True)
class StepSummary:
    """A step as far as it is known without training it again.

    Attributes
    ----------
    record
        The step; θ and the gradient of one that is trained again are empty, unless it is a keyframe.
    state
        The optimizer's state before the step by parameter name, where that is on record; else None.
    """

    record: Step
    state: Mapping[str, Mapping[str, Any]] | None = None


class Store(ABC):
    """Keeps steps in their order.

    What `read` gives back equals what was appended to the last bit, and where the ``after`` of a step was the
    ``before`` of the next, it *is* again the same tensor when neighbouring steps are read one after the other.
    `pathkernel.testing.check_store` checks it.
    """

    stopped: bool = False
    """Whether steps are no longer taken, because the disk gave out and training was to go on."""

    replays: bool = False
    """True where reading a step may mean to train it again."""

    exists: bool = False
    """Whether steps of an earlier run are there, to be gone on with."""

    outer: Store | None = None
    """The store that steps come through, which may hold some back until it is closed."""

    # Most stores need nothing else than the steps.

    def begin(self, run: Run) -> None:  # noqa: B027
        """Called before the first step with the run that the steps belong to."""

    def note_end(self, end: End) -> None:  # noqa: B027
        """Called before `begin`, and with each new `End` since, which `write_end` and `close` write down."""

    @abstractmethod
    def append(self, step: Step) -> None:
        """Put a step behind the others. Its tensors are no longer changed by anybody."""

    @abstractmethod
    def read(self, index: int) -> Step:
        """The step with this index, 0 … len − 1."""

    def summary(self, index: int) -> StepSummary:
        """The step with this index, without what has to be trained again."""
        return StepSummary(self.read(index))

    @abstractmethod
    def __len__(self) -> int: ...

    def until(self, length: int) -> Store:
        """The first steps alone, so many of them, for reading."""
        return FirstSteps(self, length)

    @abstractmethod
    def extend(self, tail: Tensor, pad: Extension) -> None:
        """Lengthen every stored vector: points of the path by ``tail``, gradients by zeros.

        Parameters
        ----------
        tail
            Values of the parameters that join θ.
        pad
            Lengthens a point, and knows the run with its longer θ.
        """

    def flush(self) -> None:  # noqa: B027 - a store that does not wait has nothing to write
        """Write what waits to be written."""

    def write_end(self) -> None:
        """Flush, and write where the path ends now, so that a recording that is killed can go on from here."""
        self.flush()

    def close(self) -> None:
        """Flush, and let go of files and threads; the steps stay readable, and `append` may follow."""
        self.flush()

    def vector(self, index: int) -> Tensor:
        """θ before the step with this index, (P,)."""
        return self.read(index).before

    def end_of_steps(self) -> Tensor:
        """θ after the last step, (P,)."""
        return self.read(len(self) - 1).after

    def columns(self, index: int, ranges: Sequence[slice]) -> list[Tensor]:
        """Ranges of θ before the step with this index: what a few parameters were, without the others."""
        vector = self.vector(index)
        return [vector[where] for where in ranges]


class FirstSteps(Store):
    """The first steps of a store, for reading.

    Parameters
    ----------
    inner
        The store, which may go on growing.
    length
        How many of its steps there are here.
    """

    def __init__(self, inner: Store, length: int) -> None:
        self.inner, self.length = inner, length

    @property
    def replays(self) -> bool:  # type: ignore[override]
        """True where reading a step may mean to train it again."""
        return self.inner.replays

    def __len__(self) -> int:
        return self.length

    def read(self, index: int) -> Step:
        """The step with this index; see `Store.read`."""
        return self.inner.read(range(self.length)[index])

    def summary(self, index: int) -> StepSummary:
        """As of `Store.summary`."""
        return self.inner.summary(range(self.length)[index])

    def vector(self, index: int) -> Tensor:
        """As of `Store.vector`."""
        return self.inner.vector(range(self.length)[index])

    def columns(self, index: int, ranges: Sequence[slice]) -> list[Tensor]:
        """As of `Store.columns`."""
        return self.inner.columns(range(self.length)[index], ranges)

    def append(self, step: Step) -> None:
        """Refuse; see `extend`."""
        raise _only_for_reading("A step was appended")

    def extend(self, tail: Tensor, pad: Extension) -> None:
        """Refuse: a part of a path is read.

        Raises
        ------
        TrajectoryError
            Always.
        """
        raise _only_for_reading("Parameters joined θ")


def _only_for_reading(found: str) -> TrajectoryError:
    return TrajectoryError(
        f"{found} in the first part of a trajectory",
        "`trajectory.until(step)` is a view of what has been recorded, and nothing is recorded into it",
        "Record into a store of its own",
    )


def padded(step: Step, tail: Tensor, pad: Extension) -> Step:
    """A step with longer vectors; see `Store.extend`."""
    zeros = torch.zeros_like(tail)
    return replace(
        step,
        before=pad(step.before),
        after=pad(step.after),
        gradient=torch.cat([step.gradient, zeros]),
        changes=tuple((name, pad(point)) for name, point in step.changes),
        gradient_changes={name: torch.cat([change, zeros]) for name, change in step.gradient_changes.items()},
    )
