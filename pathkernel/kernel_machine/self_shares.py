r"""Shares of the training samples in their own losses: the diagonal of a square of shares that is never formed.

.. math:: \mathrm{share}_i(x_i) = \sum_{r : i \in B_r} c_{r,i} \langle u_r(x_i), g_{r,i}\rangle

Each query meets the gradients of its own sample alone, so that what is held beside a block of queries is O(N). Where no
gradient goes into the optimizer's memory, u_r follows from step r by itself, and only the samples of its batch are
queries there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pathkernel.errors import InputError
from pathkernel.gradients.factored import FactoredGradients
from pathkernel.gradients.pytrees import blocks, count
from pathkernel.kernel_machine.adjoint import StepAdjoint
from pathkernel.kernel_machine.backward_sweep import BackwardSweep
from pathkernel.kernel_machine.curves import Curve, PathCurve
from pathkernel.kernel_machine.query_selection import OF_TARGETS
from pathkernel.kernel_machine.sweep_plan import Plan
from pathkernel.runtime.interrupts import defer_interrupts, deliver_interrupt
from pathkernel.runtime.precision import EXACT_PRODUCTS
from pathkernel.runtime.workspace import give_back_freed_memory
from pathkernel.trajectory.batch_gradients import RecordedGradients
from pathkernel.trajectory.stage_gradients import StageGradients
from pathkernel.trajectory.step import Segment, Step


class OwnSweep(BackwardSweep):
    """A backward sweep in which each query meets the gradients of its own sample alone.

    Parameters
    ----------
    curve, gradients
        As of a backward sweep; queries are training samples, one function of each.
    plan
        How it is cut.

    Attributes
    ----------
    own
        Shares of all training samples in their own queries, (N,) float64.
    """

    def __init__(self, curve: Curve, gradients: RecordedGradients, plan: Plan) -> None:
        super().__init__(curve, gradients, None, None, plan.cuts)
        self.passes = replace(plan.cuts.batch, directions=0, outputs=False)  # rows are formed
        self.own = self._zeros(len(gradients.columns))

    def _start_shares(self) -> Tensor:
        return torch.zeros(0, 0, dtype=torch.float64, device=self.trajectory.device)

    def ask(self, ids: Tensor) -> None:
        """Take the samples of these ids, (Q,), for the queries of the next steps."""
        self.count = len(ids)
        self._row_of = torch.full((len(self.own),), -1)
        self._row_of[ids] = torch.arange(len(ids))

    def own_step(self, step: Step, q: FactoredGradients) -> None:
        """Add what a step did to the queries of its own samples, and pull the memory's cotangents back through it."""
        if q.zero and not self.memory:
            return
        give_back_freed_memory()
        adjoint = StepAdjoint(self.rule, step, self.shapes)
        stages = self.gradients.stages(step, rows=True, passes=self.passes)
        pulled = self._pull_back_memory(step, adjoint, q, {}, {})
        if self.cuts.batch.streamed:  # rows are made anew each time they are gone through: once, for all columns
            blocks_of_columns = list(pulled)
            for place, stage in enumerate(stages):
                begin = 0
                for part in stage.parts:
                    assert isinstance(part, FactoredGradients)
                    for _, where, own in blocks_of_columns:
                        for u, scale in ((u, scale) for at, u, scale in own if at == place):
                            self._meet(stage, begin, part, where, u, scale)
                    begin += len(part)
        else:
            for _, where, own in pulled:
                deliver_interrupt()
                for place, u, scale in own:
                    begin = 0
                    for part in stages[place].parts:
                        assert isinstance(part, FactoredGradients)
                        self._meet(stages[place], begin, part, where, u, scale)
                        begin += len(part)
        if self.memory:
            self._beyond_the_rule(step, q)

    def _meet(
        self, stage: StageGradients, begin: int, part: FactoredGradients, where: slice, u: Tensor, scale: float
    ) -> None:
        """Add g_i · u(x_i) over a block of columns, for the rows of a part whose samples are asked about."""
        owners = stage.owners.part(slice(begin, begin + len(part)))
        rows = self._row_of[owners.columns]
        if not (rows >= 0).any():
            return
        columns = stage.scaled(part.columns(where, u.dtype), where)
        for place in range(rows.shape[1]):
            (asked,) = (rows[:, place] >= 0).nonzero(as_tuple=True)
            found = (columns[asked] * u[rows[asked, place]]).sum(dim=1).double() * scale
            if owners.weights is not None:
                found *= owners.weights[asked, place].to(found)
            self.own.index_add_(0, owners.columns[asked, place].to(found.device), found)


def check_own(outputs: str) -> None:
    """Refuse functions of the outputs that are not of a sample and its own target.

    Raises
    ------
    InputError
        With those that are.
    """
    if not isinstance(outputs, str) or outputs not in OF_TARGETS:
        raise InputError(
            f"`outputs={outputs!r}` was given",
            f"A sample has a share in its own {' or '.join(map(repr, OF_TARGETS))}",
            "Write `machine.self_shares()`, or `machine.explain(X, outputs=...)` for other outputs",
        )


def at_once(curve: Curve, gradients: RecordedGradients) -> Curve:
    """The queries of a curve as far as some sweep takes them together: all, or those of the largest batch."""
    return curve.block(slice(0, gradients.most)) if _each_step_alone(curve, gradients) else curve


def _each_step_alone(curve: Curve, gradients: RecordedGradients) -> bool:
    """True where a step moves the queries by its own gradient alone, weighted by their gradient there."""
    return type(curve) is PathCurve and not gradients.keeps_memory


@defer_interrupts(divisible=True)
@EXACT_PRODUCTS
def own_shares(curve: Curve, gradients: RecordedGradients, plan: Plan, progress: bool = False) -> Tensor:
    """Shares of all training samples in their own queries, (N,) float64.

    Parameters
    ----------
    curve
        Of one query for each training sample, in the order of their ids.
    gradients
        Of the recorded batches.
    plan
        How the sweep is cut.
    progress
        Show a progress bar over the steps.

    Notes
    -----
    Time of each block of queries, for an optimizer with memory: the gradients of its queries at every step, N S in all,
    and those of every batch. Without memory: the gradients of a batch as queries and as samples, 2 B S in all.
    """
    n, total = count(curve.queries.inputs), torch.zeros(len(gradients.columns), dtype=torch.float64)
    alone = _each_step_alone(curve, gradients)
    pieces = [slice(0, n)] if alone else list(blocks(n, plan.queries))
    bar = tqdm(total=len(curve.trajectory) * len(pieces), desc="self-shares", unit="step", disable=not progress)
    for piece in pieces:
        sweep = OwnSweep(curve.block(piece), gradients, plan)
        segments = _of_batches(curve, sweep, plan) if alone else _of_block(curve.block(piece), sweep, piece, plan)
        for segment, q in segments:
            if segment.step is not None:
                sweep.own_step(segment.step, q)
                bar.update()
            deliver_interrupt()
        total += sweep.own.cpu()
    bar.close()
    return total[:n]


def _of_block(curve: Curve, sweep: OwnSweep, piece: slice, plan: Plan) -> Iterator[tuple[Segment, FactoredGradients]]:
    """Segments with the averaged gradients of a block of queries, from the end of the path."""
    curve.queries.passes = plan.passes
    curve.stack = plan.cuts.steps
    sweep.ask(torch.arange(piece.start, piece.stop))
    yield from sweep.prepared(curve.backward(sweep.accumulator))


def _of_batches(curve: Curve, sweep: OwnSweep, plan: Plan) -> Iterator[tuple[Segment, FactoredGradients]]:
    """Segments with the averaged gradients of the samples of their batches alone."""
    for segment in curve.trajectory.segments():
        if segment.step is None:
            continue
        named = [batch.ids.reshape(-1) for batch in segment.step.batches if batch.source is None]
        ids = torch.cat(named).unique() if named else torch.zeros(0, dtype=torch.int64)
        for piece in blocks(len(ids), plan.queries):
            own = curve.block(ids[piece])
            own.queries.passes = plan.passes
            sweep.ask(ids[piece])
            yield segment, own.average_on(segment)
