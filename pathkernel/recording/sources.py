"""Samples that are not of the training data, as a generator makes them: they are counted as they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel.errors import InputError, SampleIdError
from pathkernel.recording.calls import CallReader, SeenCall
from pathkernel.trajectory.columns import Columns
from pathkernel.trajectory.step import MicroBatch
from pathkernel.trajectory.trajectory import Trajectory


class Sources:
    """Counts the samples of passes whose samples have no ids.

    Parameters
    ----------
    trajectory
        The record so far, whose counts go on.

    Attributes
    ----------
    name
        That of the source that the passes to come are of; None for the training data.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory = trajectory
        self.name: str | None = None
        self._counted: Columns | None = None

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Passes inside are of a source.

        Raises
        ------
        InputError
            For a name that is none.
        """
        if not isinstance(name, str) or not name:
            raise InputError(
                f"`recorder.source({name!r})` was called",
                "A source of samples that are not of the training data has a name, under which its columns of the "
                "shares are found",
                'Write `with recorder.source("generated"):` around the forward pass',
            )
        before, self.name = self.name, name
        try:
            yield
        finally:
            self.name = before

    def batch(self, call: SeenCall, reader: CallReader) -> MicroBatch:
        """The samples of a pass that is of the source at hand, to be numbered when a step uses its gradient."""
        return MicroBatch(torch.arange(_samples(call, reader)), source=self.name)

    def number(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Batches of sources with the next ids of theirs, which `count` makes final."""
        if not batches:  # recordings without sources do not read what is on record
            return []
        found, counted = [], dict(self._columns().sources)
        for batch in batches:
            assert batch.source is not None
            first = counted.get(batch.source, 0)
            counted[batch.source] = first + len(batch.ids)
            found.append(replace(batch, ids=torch.arange(first, first + len(batch.ids))))
        return found

    def count(self, numbered: Sequence[MicroBatch]) -> None:
        """Take note that a step has used some batches."""
        for batch in numbered:
            self._columns().meet(batch)

    def _columns(self) -> Columns:
        """Counts so far; of a recording that goes on, those of its record."""
        if self._counted is None:
            self._counted = Columns(0)
            for index in range(len(self.trajectory)):
                for batch in self.trajectory.store.summary(index).record.batches:
                    self._counted.meet(batch)
        return self._counted


def _samples(call: SeenCall, reader: CallReader) -> int:
    """How many samples a pass is of: the rows of its first tensor that has any."""
    for key, value in call.arguments.items():
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.dim():
                return reader.rows(key, leaf)
    raise SampleIdError(
        "A forward pass inside `recorder.source(...)` was given no tensor with samples along an axis",
        "Samples of a source are counted by the first tensor that the network is given",
        "Hand the samples to the network as a tensor, or announce ids with `recorder.announce(ids)`",
    )
