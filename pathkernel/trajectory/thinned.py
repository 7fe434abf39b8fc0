"""Stores that keep less than they are given: θ alone, at some of the steps, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pathkernel.errors import TrajectoryError
from pathkernel.gradients.forward_state import EVALUATION, ForwardState
from pathkernel.trajectory.memory import MemoryStore
from pathkernel.trajectory.run import End, Extension, Run
from pathkernel.trajectory.step import MicroBatch, Step
from pathkernel.trajectory.store import Store, padded


class ThinnedStore(Store):
    """Keeps θ at every so many steps, joined by straight lines.

    A step on record goes from one point that was kept to the next. Its learning rate is the sum of those on the way,
    the time of gradient flow that passed; its batches are their samples, by id alone.

    Parameters
    ----------
    inner
        Where the joined steps are kept.
    every
        How many steps one joined step stands for; the last before `flush` may stand for fewer.
    """

    def __init__(self, inner: Store, every: int) -> None:
        self.inner, self.every = inner, every
        self._open: Step | None = None

    @property
    def stopped(self) -> bool:  # type: ignore[override]
        """True where the inner store takes no more steps."""
        return self.inner.stopped

    @property
    def exists(self) -> bool:  # type: ignore[override]
        """True where the inner store holds steps of an earlier run."""
        return self.inner.exists

    def begin(self, run: Run) -> None:
        """Begin the inner store; see `Store.begin`."""
        self.inner.outer = self
        self.inner.begin(run)

    def note_end(self, end: End) -> None:
        """Hand on."""
        self.inner.note_end(end)

    def append(self, step: Step) -> None:
        """Lengthen the open stretch by a step."""
        self._open = joined(self._open, step, len(self.inner))
        if self._open.length == self.every:
            self._store()

    def _store(self) -> None:
        if self._open is not None:
            self.inner.append(self._open)
            self._open = None

    def read(self, index: int) -> Step:
        """The joined step with this index; the last is the stretch that is still open."""
        index = range(len(self))[index]
        return self._open if self._open is not None and index == len(self.inner) else self.inner.read(index)

    def __len__(self) -> int:
        return len(self.inner) + (self._open is not None)

    def until(self, length: int) -> Store:
        """The first joined steps alone, so many of them; the stretch that is open as it is now."""
        if length <= len(self.inner):
            return self.inner.until(length)
        return MemoryStore([self.read(index) for index in range(length)])

    def extend(self, tail: Tensor, pad: Extension) -> None:
        """Lengthen every stored vector."""
        self.inner.extend(tail, pad)
        if self._open is not None:
            self._open = replace(padded(self._open, tail, pad), gradient=self._open.gradient)

    def flush(self) -> None:
        """End the open stretch here and write it."""
        self._store()
        self.inner.flush()

    def write_end(self) -> None:
        """End the open stretch, and write the end; see `Store.write_end`."""
        self._store()
        self.inner.write_end()

    def close(self) -> None:
        """End the open stretch, and close the inner store; see `Store.close`."""
        self._store()
        self.inner.close()


def _of_theta_alone(batch: MicroBatch) -> MicroBatch:
    """The samples of a batch, and what the network was given beside them."""
    shared = batch.state.arguments
    state = ForwardState(arguments=shared) if shared else EVALUATION
    return MicroBatch(batch.ids, batch.weights, state=state, source=batch.source, parts=batch.parts)


def joined(stretch: Step | None, step: Step, index: int) -> Step:
    """A stretch and the step after it as one step of θ alone."""
    batches = tuple(map(_of_theta_alone, step.batches))
    alone = replace(
        step,
        index=index,
        gradient=torch.empty(0, dtype=step.gradient.dtype),  # a view would keep the whole
        batches=batches,
        frozen={},
        gradient_changes={},
    )
    if stretch is None:
        return alone
    return replace(
        stretch,
        after=step.after,
        active=stretch.active | step.active,
        batches=stretch.batches + batches,
        groups={**stretch.groups, **step.groups},
        hyperparameters=tuple(
            _summed(stretch.hyperparameters[g] if g < len(stretch.hyperparameters) else {}, group)
            for g, group in enumerate(step.hyperparameters)
        ),
        changes=stretch.changes,
        length=stretch.length + step.length,
    )


def _summed(stretch: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    return {**group, "lr": stretch.get("lr", 0) + group["lr"]} if "lr" in group else dict(group)


class LastStepStore(Store):
    """Keeps the last step alone, of a path that others look at while it is taken."""

    def __init__(self) -> None:
        self._seen = 0
        self._last: Step | None = None

    def append(self, step: Step) -> None:
        """Keep a step in place of the one before."""
        self._last, self._seen = step, self._seen + 1

    def read(self, index: int) -> Step:
        """The last step; the others are gone.

        Raises
        ------
        TrajectoryError
            For any other step.
        """
        if self._last is None or range(self._seen)[index] != self._seen - 1:
            raise TrajectoryError(
                f"Step {index} was asked for, and this path was streamed, not stored",
                "A streamed path keeps its last step only",
                "Ask the observers for their results, or record with `Keyframes(32)`",
            )
        return self._last

    def __len__(self) -> int:
        return self._seen

    def extend(self, tail: Tensor, pad: Extension) -> None:
        """Lengthen the vectors of the last step."""
        if self._last is not None:
            self._last = padded(self._last, tail, pad)
