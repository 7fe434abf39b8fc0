"""Memory that the batches of a run take, measured on a few samples of one batch of each kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import PyTree
from pathkernel.gradients.losses import coupled_row_blocks, weighted_gradient
from pathkernel.gradients.per_sample import output_products
from pathkernel.gradients.pytrees import take
from pathkernel.gradients.returned import batch_outputs
from pathkernel.runtime.allocations import Footprint, allocated, footprint, footprint_of, proportional
from pathkernel.trajectory.batch_gradients import RecordedGradients
from pathkernel.trajectory.samples import samples_of
from pathkernel.trajectory.step import MicroBatch, Step

NOTHING = Footprint(np.zeros(1), np.zeros(1))


@dataclass(frozen=True)
class BatchSizes:
    """Memory that the batches of a run take.

    Attributes
    ----------
    most, largest
        Samples in the largest step, and in the largest batch.
    separate
        Samples that may go through the network a few at a time.
    whole, held
        Bytes of the largest batch that goes through it whole, during the pass and afterwards; 0 where there is none.
    rows
        Whether the gradients of such a batch are rows that are made one by one.
    inputs
        Bytes of a sample.
    """

    most: int
    largest: int
    separate: Footprint
    whole: float
    held: float
    rows: bool
    inputs: float

    @classmethod
    def of(cls, gradients: RecordedGradients, kinds: Sequence[SmallBatch]) -> BatchSizes:
        """Measure a few samples of one batch of each kind.

        Parameters
        ----------
        gradients
            Of the recorded batches.
        kinds
            See `kinds_of_batches`.
        """
        separate, whole, held, rows, inputs = [NOTHING], 0.0, 0.0, False, 0.0
        for one in kinds:
            inputs = max(inputs, one.bytes)
            found = one.footprint
            if one.coupled or one.random:
                whole, held = max(whole, found.peak(one.size)), max(held, found.held(one.size))
            else:
                separate.append(found)
            rows = rows or one.coupled
        largest = max(size for size, _, _ in gradients.examples.values())
        return cls(gradients.most, largest, max(separate, key=lambda found: found.peak(64)), whole, held, rows, inputs)

    @staticmethod
    def of_trial(kinds: Sequence[SmallBatch], samples: int) -> tuple[float, float]:
        """Peak bytes of so many samples, and the bytes held of them and their inputs, at most, from a single trial."""
        peaks, held = [0.0], [0.0]
        for one in kinds:
            vector = 8.0 * one.function.layout.size
            found = proportional(one.allocated, vector)
            peaks.append(found.peak(samples))
            held.append(found.held(samples) + samples * (one.bytes + (vector if one.coupled else 0.0)))
        return max(peaks), max(held)


def kinds_of_batches(gradients: RecordedGradients, pushed: int = 1, total: bool = False) -> list[SmallBatch]:
    """A few samples of the largest batch of each kind of forward pass.

    Parameters
    ----------
    gradients
        Of the recorded batches.
    pushed
        Directions along which a batch is pushed at once.
    total
        Whether only the sum of the gradients is wanted.
    """
    found = []
    for size, index, place in gradients.examples.values():
        step = gradients.trajectory.store.summary(index).record
        one = SmallBatch(gradients, step, step.batches[place], pushed, size, total)
        if not (one.coupled or total):
            one.source.prove(one.point, take(one.inputs, slice(0, 2)), one.function, trial=True)
        found.append(one)
    return found


def pushed_at_once(samples: int, few: SmallBatch, free: float, most: int) -> int:
    """Directions along which a batch of so many samples is pushed at once in so many bytes; 0 where none fits."""
    two, three = (footprint(lambda n, d=d: few.along(n, d)).peak(samples) for d in (2, 3))  # type: ignore[misc]
    each = max(three - two, 1.0)
    return int(max(0.0, min(most, (free - (two - 2 * each)) // each)))


class SmallBatch:
    """A few samples of a batch, to be tried out.

    Parameters
    ----------
    gradients, step, batch
        The batch, and the record that it is of.
    pushed
        Directions along which it is pushed at once.
    size
        Samples of the batch.
    total
        Whether only the sum of the gradients is wanted.
    """

    def __init__(
        self, gradients: RecordedGradients, step: Step, batch: MicroBatch, pushed: int, size: int, total: bool
    ) -> None:
        index = torch.arange(4) % len(batch.ids)
        inputs, targets = (None if own is None else take(own, index) for own in (batch.inputs, batch.targets))
        parts = None if batch.parts is None else batch.parts[index]
        few = MicroBatch(batch.ids[index], None, inputs, targets, source=batch.source, parts=parts)
        self.inputs, _ = samples_of(few, gradients.trajectory.data)
        # What a pass takes does not depend on θ, which is not on record for a step that is trained again.
        self.point = step.before if step.before.numel() else gradients.trajectory.final
        self.pushed, self.function = pushed, gradients.batches.replayed(step, batch)
        self.size, self.whole = size, total
        self._allocated: dict[int, np.ndarray] = {}
        self.source, self.random = gradients.batches.source_of(batch), bool(batch.state.generators)
        self.coupled = gradients.batches.together(batch, self.point, self.inputs)

    @property
    def bytes(self) -> float:
        """Bytes of a sample."""
        return sum(leaf.nbytes for leaf in pytree.tree_leaves(self.inputs)) / 4

    def allocated(self, n: int) -> np.ndarray:
        """Bytes allocated and freed by the gradients of n samples, or by their sum where that is wanted; seen once."""
        if n not in self._allocated:
            self._allocated[n] = allocated(self.total if self.whole else self.taken, n)
        return self._allocated[n]

    @property
    def footprint(self) -> Footprint:
        """Bytes of the same for any number of samples."""
        return footprint_of(self.allocated)

    def taken(self, n: int) -> Any:
        """Gradients of n samples, and a product with each of a few directions; coupled ones are rows, one by one."""
        if self.coupled:
            for _ in coupled_row_blocks(self.function, self.point, *self._weighted(n), 1):
                pass
            return None
        ones = lambda outputs: torch.ones_like(batch_outputs(outputs, n))  # noqa: E731
        with self.source.tapes.trying():
            part = self.source.pulled_back(self.point, take(self.inputs, slice(0, n)), ones, self.function)
        for piece in part.pieces:
            piece.factor.products(
                torch.zeros(self.pushed, piece.factor.size, dtype=piece.factor.dtype, device=piece.factor.device)
            )
        return part

    def along(self, n: int, directions: int) -> Any:
        """Derivatives of n samples along so many directions at once."""
        size = self.function.layout.size
        zeros = torch.zeros(directions, size, dtype=self.function.dtype, device=self.function.device)
        return output_products(self.function, self.point, take(self.inputs, slice(0, n)), zeros, width=directions)

    def total(self, n: int) -> Tensor:
        """The sum of the gradients of n samples."""
        return weighted_gradient(self.function, self.point, *self._weighted(n)).double()

    def _weighted(self, n: int) -> tuple[PyTree, Tensor]:
        inputs = self.function.cast(take(self.inputs, slice(0, n)))
        with self.function.evaluating(gradients=False):
            outputs = self.function.batch(self.function.parameters(self.point), inputs)
        return inputs, torch.ones_like(outputs)
