"""Sweeps of the parts of a block of queries that walk a path in step: what a batch takes is taken once for all parts.

The cotangents of the optimizer's memory are there for all queries throughout, gradients for one part at a time. At each
step the batch is run, compared and formed for the part that comes first; the others meet the columns that it left.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from tqdm.auto import tqdm

from pathkernel.gradients.pytrees import blocks, count
from pathkernel.kernel_machine.accumulator import Accumulator, concatenate
from pathkernel.kernel_machine.backward_sweep import BLOCK, BackwardSweep, Cuts, TakenApart
from pathkernel.kernel_machine.curves import Curve
from pathkernel.runtime.interrupts import defer_interrupts
from pathkernel.runtime.precision import EXACT_PRODUCTS
from pathkernel.trajectory.batch_gradients import RecordedGradients
from pathkernel.trajectory.step import Segment, SharedSegment, Step


@defer_interrupts(divisible=True)
@EXACT_PRODUCTS
def sweep_in_step(
    curve: Curve, gradients: RecordedGradients, by: str | None, progress: bool, cuts: Cuts
) -> Accumulator:
    """Shares of all training samples in all queries; as of `pathkernel.kernel_machine.backward_sweep.backward_sweep`.

    Parameters
    ----------
    curve
        The recorded path.
    gradients
        Of the recorded batches.
    by
        None or ``"step"``.
    progress
        Show a progress bar over the steps.
    cuts
        With the samples of a part.

    Notes
    -----
    Time per step: the gradients of all queries, those of one batch, and one reading of the batch's rows for each part.
    """
    assert cuts.part is not None
    n = count(curve.queries.inputs)
    even = math.ceil(n / math.ceil(n / cuts.part))
    # A block of columns is the same for all parts, of which one may be smaller.
    cuts = replace(cuts, columns=max(1, min(cuts.columns, BLOCK // (even * curve.queries.components))))
    parts = [curve.block(piece) for piece in blocks(n, even)]
    segments = passed_by_all(map(SharedSegment.of, curve.trajectory.segments(reverse=True)), len(parts))
    sweeps = [BackwardSweep(part, gradients, by, None, cuts) for part in parts]
    shared = SharedSteps(sweeps[0])
    for part, own in zip(parts, segments, strict=True):
        part.segments = own
    bar = tqdm(total=len(curve.trajectory), desc="backward sweep", unit="step", disable=not progress)
    walks = [sweep.walk(part, shared) for part, sweep in zip(parts, sweeps, strict=True)]
    for segment, *_ in zip(*walks, strict=True):
        bar.update(segment.step is not None)
    bar.close()
    shared.forget()
    return concatenate((sweep.finish() for sweep in sweeps), len(curve.queries))


def passed_by_all(segments: Iterator[Segment], count: int) -> list[Iterator[Segment]]:
    """Iterators over the same segments, each of which is let go when all have passed it.

    `itertools.tee` keeps what was passed in blocks of 57.
    """
    waiting: list[deque[Segment]] = [deque() for _ in range(count)]

    def walked(own: deque[Segment]) -> Iterator[Segment]:
        while True:
            if not own:
                following = next(segments, None)
                if following is None:
                    return
                for one in waiting:
                    one.append(following)
                del following
            yield own.popleft()

    return [walked(own) for own in waiting]


class SharedSteps:
    """Steps as a sweep takes them apart, once for all sweeps that walk in step with it.

    Parameters
    ----------
    sweep
        The sweep. Its blocks of columns are those of the others.
    """

    def __init__(self, sweep: BackwardSweep) -> None:
        self._sweep = sweep
        self._found: tuple[Step, TakenApart] | None = None

    def __call__(self, segment: Segment, step: Step) -> TakenApart:
        """A step taken apart; the one before is let go first."""
        if self._found is not None and self._found[0] is step:
            return self._found[1]
        self.forget()
        found = self._sweep.take_apart(segment, step)
        names = [name for name in self._sweep.layout.names if name in step.active]
        coefficients = (found.adjoint.linear(name) for name in names)
        # A step that only scales the gradient asks for the pieces that it is made of.
        if any(own is None or own.rate is None for own in coefficients):
            columns = [where for name in names for where in self._sweep.blocks(name)]
            for received in found.received:
                received.form(columns, self._sweep.dtype, self._sweep.gradients.source.workspace)
        self._found = step, found
        return found

    def forget(self) -> None:
        """Let the step go that was taken apart last."""
        self._found = None
